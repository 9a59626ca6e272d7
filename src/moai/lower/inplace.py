"""Results are written over arguments that nobody needs any more.

In: functional instructions. Out: instructions some of which write in place, and the names that results have since:
an in-place instruction returns nothing, its result goes by the name of the value it overwrote.

Inside of a loop only what the same pass has made is overwritten; a sum over passes may begin in the memory of its first
term, if nobody else has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from moai.graph.step_graph import Ref, flat_ids, map_args, refs
from moai.lower.cleanup import renamed_refs, uses
from moai.lower.memory import SharedMemory
from moai.lower.operators import BOUNDS, in_place_form, is_view, operator, overlaps_itself
from moai.lower.program import Instruction
from moai.lower.values import Values

_CLONE = "aten.clone.default"
# What a list holds is still read in other passes and loops.
_SHARED = frozenset({"collect", "take"})


def in_place(
    code: Sequence[Instruction], borrowed: Iterable[int], kept: Iterable[int], values: Values
) -> tuple[list[Instruction], dict[int, int]]:
    """Rewrite `code`. `borrowed`: inputs to be left as they are; `kept`: values needed after the last instruction."""
    walk = _Walk(code, borrowed, kept, values)
    return walk.out, walk.renamed


class _Walk:
    """One pass over the code. Memory and last uses go by the values' names before renaming."""

    def __init__(self, code: Sequence[Instruction], borrowed: Iterable[int], kept: Iterable[int], values: Values):
        self.out: list[Instruction] = []
        self.renamed: dict[int, int] = {}
        self._values = values
        self._memory = SharedMemory()
        self._borrowed = set(borrowed)
        self._overlapping: set[int] = set()
        self._last_use = {id_: at for at, instruction in enumerate(code) for id_ in uses(instruction)}
        self._last_use |= dict.fromkeys(kept, len(code))
        self._made: dict[int, int] = {o: at for at, i in enumerate(code) for o in flat_ids(i.outs)}
        self._begin = -1  # of the loop around the instruction at hand, or of its part
        for at, instruction in enumerate(code):
            if instruction.op in BOUNDS:
                self._begin = -1 if instruction.op == "end_repeat" else at
            elif instruction.op == "accumulate":
                instruction = replace(instruction, args=(instruction.args[0], self._owns(instruction, at)))
            elif instruction.op in _SHARED:
                self._borrowed.update(uses(instruction))
                self._borrowed.update(flat_ids(instruction.outs))
            if not self._rewrite(instruction, at):
                self._keep(instruction)

    def _owns(self, instruction: Instruction, at: int) -> bool:
        """Whether the memory of what is added up is nobody else's after the instruction."""
        (x,) = uses(instruction)
        whole = self._values.local_bytes(self._memory.find(x)) == self._values.local_bytes(x)
        return whole and x not in self._overlapping and self._dead(x, at)

    def _keep(self, instruction: Instruction) -> None:
        self._memory.follow(instruction)
        inherited = is_view(instruction.op) and any(i in self._overlapping for i in uses(instruction))
        if inherited or overlaps_itself(instruction):
            self._overlapping.update(flat_ids(instruction.outs))
        args, kwargs = renamed_refs((instruction.args, instruction.kwargs), self.renamed)
        self.out.append(instruction if args is instruction.args else replace(instruction, args=args, kwargs=kwargs))

    def _rewrite(self, instruction: Instruction, at: int) -> bool:
        """Append the in-place form of `instruction`, if it has one and may use it."""
        form = in_place_form(instruction.op)
        if form is None or any(p >= len(instruction.args) for p in form.mutated):
            return False
        results = list(flat_ids(instruction.outs))
        overwritten = [r.id for p in form.mutated for r in refs(instruction.args[p])]
        if len(results) != len(overwritten):
            return False
        untouched = _only_read(instruction)
        readers = Counter(self._memory.find(i) for i in uses(instruction))
        free = [
            x in untouched or self._may_overwrite(x, y, at, readers) for x, y in zip(overwritten, results, strict=True)
        ]
        in_list = any(isinstance(instruction.args[p], tuple) for p in form.mutated)
        if not (any(free) if in_list else all(free)):
            return False
        targets = []  # what is written: by position, since a list may hold one value twice
        for x, y, may in zip(overwritten, results, free, strict=True):
            if may:
                self._memory.join(y, x)
                self.renamed[y] = self.renamed.get(x, x)
            else:  # an element of a list that is needed later
                self.renamed[y] = self._copy(x, instruction.where)
            targets.append(Ref(self.renamed[y]))
        args = list(renamed_refs(instruction.args, self.renamed))
        target = iter(targets)
        for p in form.mutated:
            args[p] = map_args(instruction.args[p], lambda leaf: next(target) if isinstance(leaf, Ref) else leaf)
        kwargs = renamed_refs(instruction.kwargs, self.renamed)
        self.out.append(Instruction(form.op, tuple(args), kwargs, None, (), (), instruction.where))
        return True

    def _may_overwrite(self, x: int, y: int, at: int, readers: Counter[int]) -> bool:
        """Whether `x` is dead after instruction `at` with all that shares its memory, and `y` fits in its place."""
        values = self._values
        return (
            values.types[x] == values.types[y]
            and values.placement(x) == values.placement(y)
            and x not in self._overlapping
            and readers[self._memory.find(x)] == 1
            and self._dead(x, at)
        )

    def _dead(self, x: int, at: int) -> bool:
        """Whether nobody reads what shares memory with `x` after instruction `at`, in a later pass either."""
        return all(
            m not in self._borrowed and self._last_use.get(m, -1) <= at and self._made.get(m, -1) >= self._begin
            for m in self._memory.members(x)
        )

    def _copy(self, x: int, where: str) -> int:
        values = self._values
        fresh = values.new(values.types[x], values.placement(x))
        source = Ref(self.renamed.get(x, x))
        self.out.append(Instruction(_CLONE, (source,), {}, fresh, (), (values.local_shape(fresh),), where))
        return fresh


def _only_read(instruction: Instruction) -> set[int]:
    """Arguments declared as written which are not: fused optimizers change gradients only to unscale them."""
    if not instruction.op.startswith("aten._fused_") or instruction.kwargs.get("grad_scale") is not None:
        return set()
    names = [a.name for a in operator(instruction.op)._schema.arguments]
    arg: Any = instruction.args[names.index("grads")] if "grads" in names else ()
    return {r.id for r in refs(arg)}
