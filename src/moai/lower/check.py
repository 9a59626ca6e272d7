"""Checks that a Program can be executed as it stands. A failure is a bug of ours, and says where."""

from __future__ import annotations

from typing import Any

from moai.graph.placement import Shard
from moai.graph.step_graph import flat_ids
from moai.lower.cleanup import uses
from moai.lower.operators import COLLECTIVES, operator
from moai.lower.program import Instruction, PerRank, Program


def check(program: Program) -> None:
    """Values are defined before they are used, and not used after; shapes are known; outputs are written."""
    alive = {s.id for s in program.inputs}
    defined = set(alive)
    for at, instruction in enumerate(program.instructions):
        here = f"instruction {at} of {program.name}: {instruction}"
        for id_ in uses(instruction):
            assert id_ in defined, f"%{id_} is used before it is defined, {here}"
            assert id_ in alive, f"%{id_} is used after it was freed, {here}"
        outs = list(flat_ids(instruction.outs))
        assert not defined.intersection(outs), f"a value is defined twice, {here}"
        _check_operator(instruction, program.n_devices, len(outs), here)
        defined.update(outs)
        alive.update(outs)
        assert alive.issuperset(instruction.frees), f"a value is freed twice, {here}"
        alive.difference_update(instruction.frees)
    for slot in program.outputs:
        assert slot.id in alive, f"output %{slot.id} of {program.name} is never written, or was freed"
    for slot in (*program.inputs, *program.outputs):
        if isinstance(slot.placement, Shard):
            length = slot.type.shape[slot.placement.dim]
            assert sum(slot.placement.sizes) == length, f"%{slot.id}: parts {slot.placement.sizes} of {length}"


def _check_operator(instruction: Instruction, n_devices: int, n_outs: int, here: str) -> None:
    if instruction.op in COLLECTIVES:
        # What differs between devices would make them disagree about the message.
        assert not any(isinstance(a, PerRank) for a in instruction.args), f"a collective differs by device, {here}"
        assert n_devices > 1, f"a collective on one device, {here}"
    else:
        operator(instruction.op)
    if instruction.op != "all_reduce_start":
        assert len(instruction.shapes) == n_outs, f"{len(instruction.shapes)} shapes for {n_outs} results, {here}"
    for shape in instruction.shapes:
        for length in shape:
            assert _fits(length, n_devices), f"a length of {length} on {n_devices} devices, {here}"


def _fits(length: Any, n_devices: int) -> bool:
    if isinstance(length, PerRank):
        return len(length.values) == n_devices and min(length.values) >= 0
    return isinstance(length, int) and length >= 0
