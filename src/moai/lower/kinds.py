"""What the values of a step are to it: gradients of its parameters, activations, or something else.

In: a step's program, and where its backward and its optimizer begin. Out: kinds of values and messages. Others are
copies of states (in another precision, or gathered), and what the optimizer makes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moai.graph.step_graph import flat_ids
from moai.lower.cleanup import uses
from moai.lower.operators import BUILTINS, STARTS, is_view
from moai.lower.pieces import Kind
from moai.lower.program import Instruction, Program

# They hand a gradient on as it is, or as a sum with those of others.
_HANDED_ON = frozenset({"all_reduce", "reduce_scatter", "all_gather", "wait", "accumulate", *STARTS})
_CASTS = frozenset({"aten._to_copy.default", "aten.clone.default"})
_COPY = "aten.copy_.default"


def kinds(program: Program, batch: Collection[int], begins: tuple[int, int]) -> dict[int, Kind]:
    """By value, and by message. `batch`: inputs that are data; `begins`: of backward and optimizer."""
    backward, optimizer = begins
    early, late = program.instructions[:optimizer], program.instructions[optimizer:]
    found: dict[int, Kind] = dict.fromkeys(batch, "activations")
    remade = _made_of_states(early, {s.id for s in program.inputs} - set(batch))
    found.update(dict.fromkeys(_made(early) - remade, "activations"))
    own = {o for at, each in enumerate(early) if at >= backward or each.op == "bucket" for o in flat_ids(each.outs)}
    read = {i for each in late for i in uses(each)} | {s.id for s in program.outputs}
    gradients = _terms(early, read & own, own)
    gradients |= _sums(late, gradients)
    found.update(dict.fromkeys(gradients & _made(program.instructions), "gradients"))
    # A message is of the kind of what it brings.
    waits = [each for each in program.instructions if each.op == "wait" and each.outs]
    found.update({each.args[0].id: found[each.outs[0]] for each in waits if each.outs[0] in found})
    return found


def _made(code: Sequence[Instruction]) -> set[int]:
    """Values, and not the messages under way."""
    return {o for each in code if each.op not in STARTS for o in flat_ids(each.outs)}


def _made_of_states(code: Sequence[Instruction], states: set[int]) -> set[int]:
    """Values that are made of states alone."""
    found = set(states)
    for each in code:
        given = uses(each)
        if given and found.issuperset(given):
            found.update(flat_ids(each.outs))
    return found


def _terms(code: Sequence[Instruction], gradients: set[int], own: set[int]) -> set[int]:
    """`gradients`, with what these are made of in `code` by handing it on: those of `own`."""
    found = set(gradients)
    for each in reversed(code):
        if each.op == _COPY:
            target, *terms = uses(each)
            if target in found:
                found.update(own.intersection(terms))
        elif _hands_on(each) and not found.isdisjoint(flat_ids(each.outs)):
            found.update(own.intersection(uses(each)))
    return found


def _sums(code: Sequence[Instruction], gradients: set[int]) -> set[int]:
    """What `code` makes of gradients by handing them on."""
    found = set(gradients)
    for each in code:
        if each.op == _COPY:
            target, *terms = uses(each)
            if not found.isdisjoint(terms):
                found.add(target)
        elif _hands_on(each) and not found.isdisjoint(uses(each)):
            found.update(flat_ids(each.outs))
    return found - gradients


def _hands_on(instruction: Instruction) -> bool:
    op = instruction.op
    return op in _HANDED_ON or op in _CASTS or (op not in BUILTINS and is_view(op))
