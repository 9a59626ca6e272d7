"""Meshes and placements: which devices belong together, and what part of a tensor each of them has."""

from __future__ import annotations

import random

import pytest

from moai.graph.placement import Mesh, Placement, Shard, local_shape, split_evenly, split_nested
from tests.lower.placements import random_placement

CUBE = Mesh((("dp", 2), ("tp", 3), ("micro", 4)))


def test_devices_are_numbered_row_by_row():
    assert CUBE.n_devices == 6
    assert [CUBE.coordinates(r)["dp"] for r in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [CUBE.coordinates(r)["tp"] for r in range(6)] == [0, 1, 2, 0, 1, 2]


def test_micro_batches_need_no_devices():
    assert CUBE.steps == 4 and Mesh((("dp", 2),)).steps == 1
    assert Mesh((("micro", 4),)).n_devices == 1
    assert CUBE.coordinates(5, step=3) == {"dp": 1, "tp": 2, "micro": 3}


def test_peers_differ_on_the_named_axes_alone():
    assert CUBE.group(("tp",), 4) == [3, 4, 5]
    assert CUBE.group(("dp",), 4) == [1, 4]
    assert CUBE.group(("dp", "tp"), 4) == [0, 1, 2, 3, 4, 5]


def test_peers_are_in_the_order_of_the_axes_as_named():
    assert CUBE.group(("tp", "dp"), 0) == [0, 3, 1, 4, 2, 5]


def test_an_index_counts_row_by_row():
    at = {"dp": 1, "tp": 2, "micro": 3}
    assert CUBE.index(("dp", "tp"), at) == 5
    assert CUBE.index(("dp", "micro"), at) == 7
    assert CUBE.index((), at) == 0
    assert CUBE.count(("dp", "micro")) == 8


@pytest.mark.parametrize(("length", "parts", "expected"), [(7, 3, (3, 2, 2)), (2, 4, (1, 1, 0, 0)), (0, 2, (0, 0))])
def test_even_parts_differ_by_one_at_most(length, parts, expected):
    assert split_evenly(length, parts) == expected


def test_nested_parts_are_even_within_those_around_them():
    assert split_nested(7, [2, 2]) == (2, 2, 2, 1)
    assert split_nested(9, [2, 3]) == (2, 2, 1, 2, 1, 1)
    assert split_nested(5, []) == (5,)


def test_the_part_of_a_device():
    placement = Placement((Shard(0, ("dp", "micro"), (2, 1, 0, 1, 1, 1, 1, 0)), Shard(1, ("tp",), (2, 1, 1), blocks=3)))
    assert local_shape((7, 12), placement, CUBE, {"dp": 1, "tp": 0, "micro": 1}) == (1, 6)
    assert local_shape((7, 12), placement, CUBE, {"dp": 0, "tp": 2, "micro": 2}) == (0, 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_of_all_devices_are_the_whole(seed: int):
    r = random.Random(seed)
    mesh = Mesh((("dp", 2), ("tp", 3)))
    for _ in range(20):
        shape = (r.randint(1, 6), r.randint(1, 6))
        placement = random_placement(shape, mesh, r, partial=False)
        sizes = [local_shape(shape, placement, mesh, mesh.coordinates(d)) for d in range(6)]
        copies = 6 // mesh.count(placement.split_axes)
        assert sum(a * b for a, b in sizes) == copies * shape[0] * shape[1]


def test_a_placement_is_printed_in_short():
    assert str(Placement()) == "R"
    shards = Shard(0, ("dp",), (2, 2)), Shard(1, ("tp",), (1, 1, 1), blocks=3)
    assert str(Placement(shards, ("micro",))) == "S0(dp) S1x3(tp) P(micro)"
