"""Which dims go together, and which are made of several loops."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moai.lower.canonical import canonical
from moai.lower.dim_classes import DimClass, dim_classes
from tests.lower.step_tracing import trace

Tensor = torch.Tensor


def classes_of(fn: Callable[..., Tensor], *shapes: tuple[int, ...]) -> list[DimClass]:
    """The classes of the dims of a function; values 0, 1, ... are its arguments."""
    nodes, types, _ = canonical(trace(lambda *args: (fn(*args),), [], [torch.randn(s) for s in shapes]))
    return dim_classes(nodes, dict(enumerate(types)))


def with_dim(classes: list[DimClass], value: int, dim: int) -> dict[int, DimClass]:
    """The classes that a dim is in, by the runs that it consists of."""
    return {c.dims[value, dim]: c for c in classes if (value, dim) in c.dims}


def test_dims_that_an_operator_runs_one_loop_over_are_of_one_class():
    classes = classes_of(lambda x, w: x @ w, (4, 6), (6, 10))
    assert with_dim(classes, 0, 1)[1] is with_dim(classes, 1, 0)[1]
    assert with_dim(classes, 0, 1)[1] is not with_dim(classes, 1, 1)[1]


def test_a_fused_dim_is_in_a_class_for_each_of_its_loops():
    classes = classes_of(lambda x: x.view(4, 3, 2, 5)[:, 1], (4, 30))
    found = with_dim(classes, 0, 1)
    assert {runs: (c.steps, c.bound) for runs, c in found.items()} == {1: (3, True), 3: (2, False), 6: (5, False)}


def test_what_is_found_of_one_dim_holds_for_those_it_goes_with():
    classes = classes_of(lambda x, y: (x + y) * y.view(4, 3, 10)[:, 1:].sum(), (4, 30), (4, 30))
    assert with_dim(classes, 0, 1)[3] is with_dim(classes, 1, 1)[3]
    assert with_dim(classes, 0, 1)[1].bound


def test_loops_that_cross_are_bound():
    classes = classes_of(lambda x: x.view(2, 3).t().reshape(6).view(3, 2).t().reshape(6).view(3, 2), (6,))
    assert all(c.bound for c in with_dim(classes, 0, 0).values())


def test_what_is_made_from_numbers_alone_binds_nothing():
    classes = classes_of(lambda x: x * torch.ones(4, 5).tril(), (4, 5))
    assert not any(c.bound for c in classes)
