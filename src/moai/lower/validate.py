"""A Program walked as single devices will run it, on tensors without data.

In: a Program, and the types that its values are to have. Out: nothing, or `InvalidProgram` with the first problem.

Every operator is run on local shapes, collectives are modelled. What must hold: shapes and dtypes are the claimed ones;
the peers of a collective bring what fits together, and stages receive what is sent to them; nothing is used that is not
there, not yet written or under way to other devices; nothing is overwritten that somebody else still reads; outputs are
whole and have memory of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from moai.graph.placement import TIME, local_shape
from moai.graph.step_graph import Ref, Scalar, TensorType, flat_ids, map_args
from moai.lower import on_meta
from moai.lower.cleanup import uses
from moai.lower.coordinates import per_ranks, representatives
from moai.lower.exchanged import mismatch, received
from moai.lower.held_memory import HeldMemory, memory_of
from moai.lower.operators import BUILTINS, COLLECTIVES, STARTS
from moai.lower.program import Instruction, PerRank, Program, Slot
from moai.lower.program_order import runs
from moai.lower.stages.exchange_check import misfit
from moai.lower.stages.mail import Mail
from moai.lower.values import local_lengths

_META = torch.device("meta")
Tensors = tuple[torch.Tensor, ...]


class InvalidProgram(RuntimeError):
    """A Program that must not run; the lowering has made a mistake."""


@dataclass
class _Handle:
    """A collective under way: its results, and the memory that it works in."""

    results: tuple[torch.Tensor, ...]
    memory: set[int] = field(default_factory=set)
    awaited: bool = False


def validate(
    program: Program, types: Mapping[int, TensorType] | None = None, ranks: Iterable[int] | None = None
) -> None:
    """Raises InvalidProgram. `types`: the global types of the values between inputs and outputs, where they are known.
    `ranks`: the devices to look at, else some that stand for all."""
    for rank in representatives(program) if ranks is None else ranks:
        if not program.stages:
            _Walk(program, rank, types or {}).run()
            continue
        walks = [_Walk(program.of(s), program.mesh.at_stage(rank, s), types or {}) for s in range(len(program.stages))]
        for walk in walks:
            walk.run()
        reason = misfit([walk.mail.events(walk.same_as) for walk in walks])
        if reason is not None:
            raise InvalidProgram(f"program {program.name}: {reason}. This is a bug of MoAI, please report it")


class _Walk:
    """One device's way through the program. Passes of the loops that are alike are walked once."""

    def __init__(self, program: Program, rank: int, types: Mapping[int, TensorType]) -> None:
        self._program = program
        self._mesh = program.mesh
        self._rank = rank
        self._types = {**types, **{s.id: s.type for s in (*program.inputs, *program.outputs)}}
        self._at = self._mesh.coordinates(rank)
        self._step: int | None = None  # the pass; None outside of loops
        self.same_as = self._passes()
        self._index = -1
        self._values: dict[int, Any] = {}  # tensors, lists as tensors by pass, handles
        self._claims: dict[int, tuple[Any, ...]] = {}
        self._memory = HeldMemory()
        self._unwritten: set[int] = set()
        self._under_way: set[int] = set()  # memory that collectives work in
        self._of_pass: set[int] = set()
        self._borrowed = {s.id for s in program.inputs if not s.donated}
        self.mail = Mail(program)

    def run(self) -> None:
        for slot in self._program.inputs:
            self._claims[slot.id] = local_lengths(slot.type.shape, slot.placement)
            self._keep(slot.id, self._fresh(self._local_shape(slot), slot.type.dtype))
        for part, step in runs(self._program):
            if step is None:
                self._leave_loop()
            elif step != self.same_as[step]:
                continue
            else:
                self._step, self._at = step, self._mesh.coordinates(self._rank, step)
            for index in part:
                if self._program.instructions[index].op == "end_repeat":
                    self._index = index
                    self._free(self._program.instructions[index])
                else:
                    self._execute(index)
            if step is not None:
                self._end_part()
        self._leave_loop()
        self._check_end()

    def _leave_loop(self) -> None:
        self._step, self._at = None, self._mesh.coordinates(self._rank)

    def _end_part(self) -> None:
        for id_ in [i for i in self._of_pass if i in self._values]:
            self._forget(id_)
        self._of_pass.clear()

    def _passes(self) -> list[int]:
        """For each pass the first that has the same numbers; the first one of a loop begins its sums, and is alone."""
        code = self._program.instructions
        differing = (i.args[2:] if i.op == "receive" else i.args for i in code)  # every message has its own number
        numbers = {n for i, args in zip(code, differing, strict=True) for n in per_ranks((args, i.kwargs, i.shapes))}
        timed = [n for n in numbers if TIME in n.axes]
        first: dict[Any, int] = {}
        found = []
        for step in range(self._mesh.steps):
            at = self._mesh.coordinates(self._rank, step)
            key = (step == 0, *(n.values[self._mesh.index(n.axes, at)] for n in timed))
            found.append(first.setdefault(key, step))
        return found

    # -- one instruction

    def _execute(self, index: int) -> None:
        self._index = index
        instruction = self._program.instructions[index]
        overwritten = [] if instruction.op in BUILTINS else on_meta.written(instruction)
        self._check_uses(instruction)
        for id_ in overwritten:
            self._check_writable(id_)
        result = self._result(instruction)
        self._unwritten.difference_update(overwritten)
        for id_ in overwritten:
            self._check_claim(id_)
        if instruction.outs is not None:
            self._bind(instruction, result)
        self._free(instruction)

    def _check_uses(self, instruction: Instruction) -> None:
        filled = set() if instruction.op in BUILTINS else on_meta.only_written(instruction)
        for id_ in uses(instruction):
            if id_ not in self._values:
                raise self._problem(f"%{id_} is used, but is gone or was never made")
            if id_ in self._unwritten and id_ not in filled:
                raise self._problem(f"%{id_} is read before all of it was written")
            x = self._values[id_]
            if self._under_way and isinstance(x, torch.Tensor) and memory_of(x) in self._under_way:
                raise self._problem(f"%{id_} is touched while devices exchange it")

    def _check_writable(self, id_: int) -> None:
        if id_ in self._borrowed:
            raise self._problem(f"%{id_} is overwritten, an input that is to stay")
        if self._step is not None and id_ not in self._of_pass:
            raise self._problem(f"%{id_} is overwritten in a loop, but comes from outside of it")
        others = self._memory.others(id_, self._values[id_])
        if others:
            raise self._problem(f"%{id_} is overwritten, and shares memory with {_listed(others)}")

    def _result(self, instruction: Instruction) -> Any:
        op = instruction.op
        args, kwargs = self._filled(instruction)
        if op in STARTS:
            return self._start(instruction, *args, **kwargs)
        if op in COLLECTIVES:
            x, axes, *how = args
            self._check_peers(op, instruction.args[0].id, x, axes, tuple(how))
            return self._received(op, x, axes, tuple(how))
        if op in BUILTINS:
            return getattr(self, f"_{op}")(instruction, *args)
        try:
            return on_meta.run(op, args, kwargs)
        except NotImplementedError:
            return self._as_claimed(instruction.outs, iter(instruction.shapes))
        except Exception as error:
            given = [_described(self._values[i]) for i in uses(instruction)]
            raise self._problem(f"fails on ({', '.join(given)}): {type(error).__name__}: {error}") from error

    def _as_claimed(self, outs: Any, shapes: Any) -> Any:
        """Results of an operator that PyTorch cannot run without data."""
        if outs is None:
            return None
        if isinstance(outs, tuple):
            return tuple(self._as_claimed(o, shapes) for o in outs)
        if outs not in self._types:
            raise self._problem(f"cannot be run without data, and nobody says what %{outs} is")
        return self._fresh(self._number(next(shapes)), self._types[outs].dtype)

    def _filled(self, instruction: Instruction) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def leaf(x: Any) -> Any:
            if isinstance(x, Ref):
                return self._values[x.id]
            if isinstance(x, Scalar):
                return on_meta.sample(instruction, x)
            return self._one_number(x)

        return map_args(instruction.args, leaf), map_args(instruction.kwargs, leaf)

    def _number(self, shape: Sequence[Any]) -> tuple[int, ...]:
        return tuple(map(self._one_number, shape))

    def _one_number(self, x: Any) -> Any:
        if not isinstance(x, PerRank):
            return x
        if self._step is None and TIME in x.axes:
            passes = [self._mesh.coordinates(self._rank, step) for step in range(self._mesh.steps)]
            if len({x.values[self._mesh.index(x.axes, at)] for at in passes}) > 1:
                raise self._problem(f"{x} depends on the pass, and stands in no loop")
        return x.values[self._mesh.index(x.axes, self._at)]

    # -- results, claims and ends of values

    def _bind(self, instruction: Instruction, result: Any) -> None:
        self._claims.update(zip(flat_ids(instruction.outs), instruction.shapes, strict=False))

        def bind(outs: Any, found: Any) -> None:
            if isinstance(outs, tuple):
                if len(outs) != len(found):
                    raise self._problem(f"gives {len(found)} results for {outs}")
                for o, x in zip(outs, found, strict=True):
                    bind(o, x)
            elif outs is not None:
                self._keep(outs, found)
                self._check_claim(outs)
                if self._step is not None and instruction.op not in ("accumulate", "collect"):
                    self._of_pass.add(outs)

        bind(instruction.outs, result)

    def _keep(self, id_: int, x: Any) -> None:
        self._values[id_] = x
        if isinstance(x, torch.Tensor):
            self._memory.hold(id_, x)

    def _check_claim(self, id_: int) -> None:
        x = self._values[id_]
        if not isinstance(x, torch.Tensor):
            return
        if id_ not in self._claims:
            raise self._problem(f"nobody says which shape %{id_} has")
        shape = self._number(self._claims[id_])
        if tuple(x.shape) != shape:
            raise self._problem(f"%{id_} is {_described(x)}, and was to be of shape {list(shape)}")
        if id_ in self._types and self._types[id_].dtype != x.dtype:
            raise self._problem(f"%{id_} is {_described(x)}, and was to be {self._types[id_].dtype}")

    def _free(self, instruction: Instruction) -> None:
        for id_ in instruction.frees:
            if id_ not in self._values:
                raise self._problem(f"%{id_} is freed, but is gone")
            if self._step is not None and id_ not in self._of_pass:
                raise self._problem(f"%{id_} is freed in a loop, but comes from outside of it")
            self._forget(id_)

    def _forget(self, id_: int) -> None:
        x = self._values.pop(id_)
        self._of_pass.discard(id_)
        if isinstance(x, torch.Tensor):
            self._memory.release(id_, x)
        elif isinstance(x, dict):
            for step, entry in x.items():
                self._memory.release((id_, step), entry)
        elif not x.awaited:
            raise self._problem(f"nobody waits for %{id_}")

    def _check_end(self) -> None:
        self._index = len(self._program.instructions)
        for slot in self._program.outputs:
            x = self._values.get(slot.id)
            if not isinstance(x, torch.Tensor) or slot.id in self._unwritten:
                raise self._problem(f"output %{slot.id} is never written")
            if (tuple(x.shape), x.dtype) != (self._local_shape(slot), slot.type.dtype):
                raise self._problem(f"output %{slot.id} is {_described(x)}, and was to be {slot.type}@{slot.placement}")
        kept = {s.id for s in self._program.outputs} | self._borrowed
        for slot in self._program.outputs:
            others = [o for o in self._memory.others(slot.id, self._values[slot.id]) if o in kept]
            if others:
                raise self._problem(f"output %{slot.id} shares memory with {_listed(others)}")
        for id_ in list(self._values):
            self._forget(id_)

    def _local_shape(self, slot: Slot) -> tuple[int, ...]:
        return local_shape(slot.type.shape, slot.placement, self._mesh, self._at)

    def _fresh(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=_META)

    def _problem(self, text: str) -> InvalidProgram:
        program = self._program
        if 0 <= self._index < len(program.instructions):
            instruction = program.instructions[self._index]
            where = f", from {instruction.where}" if instruction.where else ""
            text = f"instruction {self._index} ({instruction.op}{where}): {text}"
        step = "" if self._step is None else f", pass {self._step}"
        return InvalidProgram(
            f"program {program.name} on mesh ({self._mesh}), device {self._rank}{step}: {text}. "
            "This is a bug of MoAI, please report it"
        )

    # -- collectives

    def _start(
        self, instruction: Instruction, xs: tuple[Any, ...], axes: Any, cuts: Any = None, in_place: bool = False
    ) -> _Handle:
        op = instruction.op.removesuffix("_start")
        how: Sequence[tuple[Any, ...]] = [("sum",)] * len(xs) if cuts is None else cuts
        if len({x.dtype for x in xs}) != 1 or len(how) != len(xs):
            raise self._problem(f"{len(xs)} tensors of one dtype, and as many cuts, are exchanged at once")
        for ref, x, cut in zip(instruction.args[0], xs, how, strict=True):
            self._check_peers(op, ref.id, x, axes, cut)
        if not in_place:
            return _Handle(tuple(self._received(op, x, axes, cut) for x, cut in zip(xs, how, strict=True)))
        memory = {memory_of(x) for x in xs}
        if len(memory) != 1 or sum(x.nbytes for x in xs) != xs[0].untyped_storage().nbytes():
            raise self._problem("what is summed in place is not all of one bucket")
        self._under_way |= memory
        return _Handle((), memory)

    def _check_peers(self, op: str, id_: int, x: torch.Tensor, axes: tuple[str, ...], cut: tuple[Any, ...]) -> None:
        """All peers bring one dtype, since they run one program; their shapes are the claimed ones."""
        if op != "all_gather" and x.dtype == torch.bool:
            raise self._problem("truth values are summed over devices")
        shapes = zip(*(self._of_peers(length, axes) for length in self._claims[id_]), strict=True)
        reason = mismatch(op, list(shapes), cut) if self._claims[id_] else None
        if reason is not None:
            raise self._problem(f"{reason}, of %{id_}")

    def _of_peers(self, length: Any, axes: tuple[str, ...]) -> list[int]:
        """The length at every coordinate over `axes`, in order."""
        if not isinstance(length, PerRank) or not set(length.axes) & set(axes):
            return [self._one_number(length)] * self._mesh.count(axes)
        if length.axes == axes:
            return list(length.values)
        coordinates = product(*(range(self._mesh.sizes[a]) for a in axes))
        places = ({**self._at, **dict(zip(axes, c, strict=True))} for c in coordinates)
        return [length.values[self._mesh.index(length.axes, at)] for at in places]

    def _received(self, op: str, x: torch.Tensor, axes: tuple[str, ...], cut: tuple[Any, ...]) -> torch.Tensor:
        return self._fresh(received(op, x.shape, cut, self._mesh.index(axes, self._at)), x.dtype)

    def _wait(self, _: Instruction, handle: _Handle) -> tuple[torch.Tensor, ...]:
        self._under_way -= handle.memory
        handle.awaited = True
        return handle.results

    def _bucket(self, instruction: Instruction, shapes: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        self._unwritten.update(flat_ids(instruction.outs))
        numels = [torch.Size(s).numel() for s in shapes]
        parts = self._fresh((sum(numels),), dtype).split(numels)
        return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))

    # -- messages

    def _send(self, _: Instruction, xs: Tensors, stage: int) -> None:
        if len({x.dtype for x in xs}) != 1 or stage not in range(self._mesh.n_stages):
            raise self._problem("tensors of one dtype are sent to one of the stages")
        self._note_message(xs)

    def _receive(self, _: Instruction, stage: int, nth: int, shapes: Any, dtype: torch.dtype) -> Tensors:
        received = tuple(self._fresh(shape, dtype) for shape in shapes)
        self._note_message(received)
        return received

    def _note_message(self, xs: Tensors) -> None:
        self.mail.note(self._index, self._step, tuple((tuple(x.shape), x.dtype) for x in xs))

    # -- what loops hand on

    def _accumulate(self, instruction: Instruction, x: torch.Tensor, owned: bool) -> torch.Tensor:
        out = instruction.outs
        if self._step == 0:
            source = instruction.args[0].id
            others = set(self._memory.others(source, x)) if owned else set()
            if owned and (others or source not in instruction.frees or source not in self._of_pass):
                raise self._problem(f"the sum begins in the memory of %{source}, not its own {_listed(others)}")
            return x if owned else self._fresh(x.shape, x.dtype)
        total = self._values[out]
        if (total.shape, total.dtype) != (x.shape, x.dtype):
            raise self._problem(f"a pass adds {_described(x)} to {_described(total)}")
        return total

    def _collect(self, instruction: Instruction, x: torch.Tensor) -> dict[int, torch.Tensor]:
        assert self._step is not None
        entries = self._values.get(instruction.outs, {})
        entries[self._step] = x
        self._memory.hold((instruction.outs, self._step), x)
        return entries

    def _take(self, instruction: Instruction, entries: dict[int, torch.Tensor]) -> torch.Tensor:
        step = self._step
        if step is None or step not in entries:
            raise self._problem("there is no entry for this pass")
        self._memory.release((instruction.args[0].id, step), entries[step])
        return entries.pop(step)

    def _join(self, instruction: Instruction, entries: dict[int, torch.Tensor], dim: int) -> torch.Tensor:
        if not set(self.same_as) <= set(entries):
            raise self._problem("some passes have made no entry")
        return torch.cat([entries[step] for step in self.same_as], dim)


def _described(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return str(TensorType(tuple(x.shape), x.dtype))
    return "no tensor"


def _listed(owners: Iterable[Any]) -> str:
    return ", ".join(f"%{o[0]} of pass {o[1]}" if isinstance(o, tuple) else f"%{o}" for o in owners)
