"""Checks that a Program can be executed as it stands. A failure is a bug of ours, and says where."""

from __future__ import annotations

from typing import Any

from moai.graph.placement import TIME, Mesh
from moai.graph.step_graph import flat_ids
from moai.lower.cleanup import uses
from moai.lower.operators import BUILTINS, COLLECTIVES, LOOPS, STARTS, operator
from moai.lower.program import PerRank, Program, Slot


def check(program: Program) -> None:
    """Values are defined before they are used, and not used after; shapes are known; outputs are written."""
    for stage in range(len(program.stages)):
        check(program.of(stage))
    if program.stages:
        return
    alive = {s.id for s in program.inputs}
    defined = set(alive)
    for at, instruction in enumerate(program.instructions):
        for id_ in uses(instruction):
            assert id_ in defined, f"%{id_} is used before it is defined, {_here(program, at)}"
            assert id_ in alive, f"%{id_} is used after it was freed, {_here(program, at)}"
        outs = list(flat_ids(instruction.outs))
        assert not defined.intersection(outs), f"a value is defined twice, {_here(program, at)}"
        _check_operator(program, at, len(outs))
        defined.update(outs)
        alive.update(outs)
        assert alive.issuperset(instruction.frees), f"a value is freed twice, {_here(program, at)}"
        alive.difference_update(instruction.frees)
    _check_results(program)
    for slot in program.outputs:
        assert slot.id in alive, f"output %{slot.id} of {program.name} is never written, or was freed"
    for slot in (*program.inputs, *program.outputs):
        _check_placement(slot, program.mesh)


def _check_results(program: Program) -> None:
    """What is awaited gives a result for each of the terms."""
    terms = {i.outs: 0 if i.kwargs.get("in_place") else len(i.args[0]) for i in program.instructions if i.op in STARTS}
    for i in program.instructions:
        if i.op == "wait":
            wanted = terms.get(i.args[0].id)
            assert len(i.outs) == wanted, f"{len(i.outs)} results of {wanted} terms, {i} of {program.name}"


def _check_placement(slot: Slot, mesh: Mesh) -> None:
    axes = [*slot.placement.split_axes, *slot.placement.partial]
    assert len(axes) == len(set(axes)) and set(axes) <= set(mesh.sizes) - {TIME}, f"%{slot.id}: {slot.placement}"
    for shard in slot.placement.shards:
        length = slot.type.shape[shard.dim]
        assert sum(shard.sizes) * shard.blocks == length, f"%{slot.id}: parts {shard.sizes} of {length}"
        assert len(shard.sizes) == mesh.count(shard.axes), f"%{slot.id}: parts {shard.sizes} on {mesh}"


def _here(program: Program, at: int) -> str:
    """For messages."""
    return f"instruction {at} of {program.name}: {program.instructions[at]}"


def _check_operator(program: Program, at: int, n_outs: int) -> None:
    instruction, mesh = program.instructions[at], program.mesh
    if instruction.op in COLLECTIVES:
        # What differs between devices would make them disagree about the message.
        assert not any(isinstance(a, PerRank) for a in instruction.args), (
            f"a collective differs by device, {_here(program, at)}"
        )
        axes = instruction.args[1]
        assert axes and set(axes) <= set(mesh.sizes) - {TIME}, f"axes {axes} on mesh {mesh}, {_here(program, at)}"
    elif instruction.op not in BUILTINS:
        operator(instruction.op)
    if instruction.op not in STARTS and instruction.op not in LOOPS:
        assert len(instruction.shapes) == n_outs, (
            f"{len(instruction.shapes)} shapes for {n_outs} results, {_here(program, at)}"
        )
    for shape in instruction.shapes:
        for length in shape:
            assert _fits(length, mesh), f"a length of {length} on mesh {mesh}, {_here(program, at)}"


def _fits(length: Any, mesh: Mesh) -> bool:
    if isinstance(length, PerRank):
        return len(length.values) == mesh.count(length.axes) and min(length.values) >= 0
    return isinstance(length, int) and length >= 0
