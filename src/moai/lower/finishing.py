"""The last passes over the instructions of a program, or of a stage of it.

In: functional instructions, in loops. Out: the same as devices are to run them: collectives in the background, what can
be fused together, results in place of what is dead, outputs with memory of their own, and what is freed when.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moai.graph.step_graph import Ref, flat_ids
from moai.lower.buckets import bucketed
from moai.lower.cleanup import uses
from moai.lower.inplace import in_place
from moai.lower.memory import SharedMemory, with_frees
from moai.lower.operators import is_view, overlaps_itself
from moai.lower.program import Instruction
from moai.lower.regions import gathered
from moai.lower.small_sums import under_way
from moai.lower.values import Values


def finished(
    code: Sequence[Instruction],
    outputs: Sequence[int],
    states: Collection[int],
    borrowed: Collection[int],
    stored: Collection[int],
    values: Values,
) -> tuple[list[Instruction], list[int]]:
    """The instructions and the outputs' names since. `states`: the outputs that the next step needs. `borrowed`: inputs
    to be left as they are. `stored`: values that can be gathered ahead of time."""
    found = under_way(code, states, values)
    found = bucketed(found, values, stored)
    found = gathered(found, outputs, values)
    found, renamed = in_place(found, borrowed, outputs, values)
    found, names = _outputs_apart(found, [renamed.get(o, o) for o in outputs], set(borrowed), values)
    return with_frees(found, {*names, *borrowed}), names


def _outputs_apart(
    code: list[Instruction], outputs: list[int], borrowed: set[int], values: Values
) -> tuple[list[Instruction], list[int]]:
    """Give every output memory of its own: a later program may overwrite one and must not change another.

    Copied is what shares memory with an earlier output or with an input that stays, what holds several entries in
    one place, and what would keep a much larger buffer alive.
    """
    memory = SharedMemory()
    overlapping: set[int] = set()
    for instruction in code:
        memory.follow(instruction)
        inherited = is_view(instruction.op) and not overlapping.isdisjoint(uses(instruction))
        if inherited or overlaps_itself(instruction):
            overlapping.update(flat_ids(instruction.outs))
    taken = {memory.find(i) for i in borrowed}
    apart = []
    for id_ in outputs:
        whole = memory.find(id_)
        if whole in taken or id_ in overlapping or values.local_bytes(id_) < values.local_bytes(whole):
            copy = values.new(values.types[id_], values.placement(id_))
            shapes = (values.local_shape(copy),)
            code = [*code, Instruction("aten.clone.default", (Ref(id_),), {}, copy, (), shapes)]
            apart.append(copy)
        else:
            taken.add(whole)
            apart.append(id_)
    return code, apart
