"""Changes of placement: from any placement to any other, with the same tensor after as before."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from moai.graph.placement import REPLICATE, TIME, Mesh, Placement, Shard, split_evenly
from moai.graph.step_graph import TensorType
from moai.lower.check import check
from moai.lower.loops import in_loops
from moai.lower.moving import moved, next_placement
from moai.lower.program import Instruction, Program, Slot
from moai.lower.values import Values
from tests.lower.lockstep import run
from tests.lower.placements import random_placement

MESHES = [
    Mesh((("dp", 2),)),
    Mesh((("dp", 3), ("tp", 2))),
    Mesh((("dp_replicate", 2), ("dp_shard", 2), ("tp", 2))),
    Mesh((("dp", 2), ("micro", 3))),
    Mesh((("dp_replicate", 2), ("dp_shard", 2), ("micro", 2))),
    Mesh((("micro", 3),)),
]
DP = Mesh((("dp", 2),))


def program_of(shape: tuple[int, ...], mesh: Mesh, way: list[Placement]) -> Program:
    """A program whose input lies as way[0] and is brought to way[1], way[2], ..., the last of which is put out."""
    type_ = TensorType(shape, torch.float64)
    values = Values((type_,), mesh)
    values.place(0, way[0])
    id_, code = 0, []
    for wanted in way[1:]:
        while values.placement(id_) != wanted:
            step = next_placement(values.placement(id_), wanted, mesh)
            id_, instructions = moved(values, id_, step, "")
            code += instructions
    code = in_loops(code, [id_], set(), values)
    program = Program("move", mesh, (Slot(0, type_, way[0]),), (Slot(id_, type_, way[-1]),), 0, tuple(code), 0, 0)
    check(program)
    return program


def collectives(*way: Placement, shape: tuple[int, ...] = (4, 6), mesh: Mesh = DP) -> list[Instruction]:
    return [i for i in program_of(shape, mesh, list(way)).instructions if "." not in i.op]


def split(dim: int, *sizes: int, axes: tuple[str, ...] = ("dp",)) -> Placement:
    return Placement((Shard(dim, axes, sizes),))


# -- any placement


@pytest.mark.parametrize("seed", range(6))
def test_a_tensor_that_moves_from_any_placement_to_any_other_stays_the_same(seed: int):
    r = random.Random(seed)
    for mesh in MESHES:
        for _ in range(8):
            shape = tuple(r.randint(1, 8) for _ in range(r.randint(1, 3)))
            now, wanted = (random_placement(shape, mesh, r) for _ in range(2))
            kept = tuple(a for a in wanted.partial if a in now.partial)
            way = [now, replace(wanted, partial=kept)]
            if TIME in mesh.sizes:
                way.insert(1, _in_passes(shape, way[1], mesh, r))
            x = torch.randn(shape, dtype=torch.float64)
            (found,) = run(program_of(shape, mesh, way), [x])
            torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12, msg=lambda m, w=way: f"{w}: {m}")


def _in_passes(shape: tuple[int, ...], placement: Placement, mesh: Mesh, r: random.Random) -> Placement:
    """`placement` with one dim split over the passes of the loop, too, within what each device has of it."""
    dim = r.randrange(len(shape))
    shard = next((s for s in placement.shards if s.dim == dim), Shard(dim, (), (shape[dim],)))
    fine = tuple(part for size in shard.sizes for part in split_evenly(size, mesh.steps))
    shards = (*(s for s in placement.shards if s.dim != dim), Shard(dim, (*shard.axes, TIME), fine, shard.blocks))
    return replace(placement, shards=tuple(sorted(shards, key=lambda s: s.dim)))


# -- at what price


def test_to_take_a_part_of_what_is_whole_needs_no_message():
    assert collectives(REPLICATE, split(0, 3, 1)) == []
    assert collectives(REPLICATE, Placement((Shard(1, ("dp",), (2, 1), blocks=2),))) == []


def test_what_is_summed_to_parts_is_scattered_at_once():
    (one,) = collectives(Placement((), ("dp",)), split(0, 3, 1))
    assert (one.op, one.args[1:]) == ("reduce_scatter", (("dp",), 0, (3, 1), 1))


def test_other_sums_are_taken_over_all_axes_at_once():
    mesh = Mesh((("dp", 2), ("tp", 2)))
    (one,) = collectives(Placement((), ("dp", "tp")), REPLICATE, mesh=mesh)
    assert (one.op, one.args[1:]) == ("all_reduce", (("dp", "tp"), "sum"))


def test_a_part_is_scattered_before_the_rest_is_summed():
    mesh = Mesh((("dp_replicate", 2), ("dp_shard", 2)))
    wanted = split(0, 2, 2, axes=("dp_shard",))
    scattered, summed = collectives(Placement((), ("dp_replicate", "dp_shard")), wanted, mesh=mesh)
    assert (scattered.op, scattered.args[1]) == ("reduce_scatter", ("dp_shard",))
    assert (summed.op, summed.args[1], summed.shapes) == ("all_reduce", ("dp_replicate",), ((2, 6),))


def test_terms_stay_terms_while_parts_are_cut_of_them():
    assert collectives(Placement((), ("dp",)), Placement((), ("dp",))) == []
    mesh = Mesh((("dp", 2), ("tp", 2)))
    assert collectives(Placement((), ("dp",)), replace(split(1, 3, 3, axes=("tp",)), partial=("dp",)), mesh=mesh) == []


def test_a_dim_split_over_two_axes_is_gathered_over_both_at_once():
    mesh = Mesh((("dp", 2), ("tp", 2)))
    (one,) = collectives(split(0, 1, 0, 2, 1, axes=("dp", "tp")), REPLICATE, mesh=mesh)
    assert (one.op, one.args[1:]) == ("all_gather", (("dp", "tp"), 0, (1, 0, 2, 1), 1))


def test_another_dim_is_cut_before_the_first_is_gathered():
    mesh = Mesh((("dp", 2), ("tp", 2)))
    (one,) = collectives(split(0, 2, 2), split(1, 3, 3, axes=("tp",)), mesh=mesh)
    assert (one.op, one.shapes) == ("all_gather", ((4, 3),))
