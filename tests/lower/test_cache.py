"""Programs are kept on disk, and found again by all that they depend on."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from moai.graph.placement import REPLICATE
from moai.graph.step_graph import StepGraph
from moai.lower import cache, lower_cached
from moai.lower.cache import folder, key
from moai.lower.lowering import VALIDATE
from moai.plan.errors import PlanError
from moai.plan.plan import Plan
from tests.lower.step_tracing import trace

PLAN = Plan(dp=2)
GIVEN = (None, None)


def chain(factor: float = 2.0, where: str = "train.py:1", length: int = cache.LEAST_NODES) -> StepGraph:
    """A product, and a number of other operators."""

    def fn(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        x = x @ w
        for _ in range(length):
            x = torch.sin(x) * factor
        return (x,)

    return trace(fn, [torch.ones(4, 4)], [torch.ones(4, 4)], where)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.delenv(VALIDATE, raising=False)
    return folder(os.environ)


@pytest.fixture
def lowered(monkeypatch):
    """The plans of what was lowered and not read."""
    plans = []

    def lower(graph, plan, given):
        plans.append(plan)
        return original(graph, plan, given)

    original = cache.lower
    monkeypatch.setattr(cache, "lower", lower)
    return plans


# ---------------------------------------------------------------------- found again


def test_a_program_is_lowered_once(lowered):
    first, second = (lower_cached(chain(), PLAN, GIVEN) for _ in range(2))
    assert lowered == [PLAN]
    assert replace(second, name=first.name) == first


def test_a_program_that_was_read_has_a_name_of_its_own():
    assert len({lower_cached(chain(), PLAN, GIVEN).name for _ in range(3)}) == 3


def test_the_key_is_the_same_in_another_process():
    code = "from tests.lower.test_cache import *; print(key(chain(), PLAN, GIVEN))"
    environ = {**os.environ, "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=100)
    assert out.stdout.strip() == key(chain(), PLAN, GIVEN), out.stderr


@pytest.mark.parametrize(
    "other",
    {
        "graph": lambda: key(chain(length=3), PLAN, GIVEN),
        "constant": lambda: key(chain(factor=3.0), PLAN, GIVEN),
        "kind_of_constant": lambda: key(chain(factor=2), PLAN, GIVEN),
        "line_of_the_script": lambda: key(chain(where="train.py:2"), PLAN, GIVEN),
        "plan": lambda: key(chain(), Plan(dp=4), GIVEN),
        "precision": lambda: key(chain(), replace(PLAN, precision="bf16"), GIVEN),
        "placements": lambda: key(chain(), PLAN, (REPLICATE, None)),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_another_of_what_it_depends_on_is_another_program(other):
    assert other[1]() != key(chain(), PLAN, GIVEN)


def test_another_version_is_another_program(monkeypatch):
    before = key(chain(), PLAN, GIVEN)
    monkeypatch.setattr(torch, "__version__", "2.99")
    monkeypatch.setattr(cache, "_VERSION", cache._version())
    assert key(chain(), PLAN, GIVEN) != before


# ---------------------------------------------------------------------- not kept


def test_it_can_be_switched_off(home, lowered, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, "0")
    for _ in range(2):
        lower_cached(chain(), PLAN, GIVEN)
    assert len(lowered) == 2
    assert not home.exists()


def test_programs_that_are_to_be_validated_are_lowered(lowered, monkeypatch):
    lower_cached(chain(), PLAN, GIVEN)
    monkeypatch.setenv(VALIDATE, "1")
    lower_cached(chain(), PLAN, GIVEN)
    assert len(lowered) == 2


def test_small_graphs_are_not_kept(home):
    lower_cached(chain(length=2), PLAN, GIVEN)
    assert not home.exists()


def test_graphs_with_operators_of_others_are_not_kept(home):
    with torch.library._scoped_library("moai_test_cache", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
        graph = chain()
        last = graph.nodes[-1]
        foreign = replace(last, op=torch.ops.moai_test_cache.twice.default, args=last.args[:1])
        lower_cached(replace(graph, nodes=(*graph.nodes[:-1], foreign)), PLAN, GIVEN)
    assert not home.exists()


def test_refusals_are_not_kept(home, lowered):
    graph = chain()
    backward = replace(graph.nodes[-1], origin=replace(graph.nodes[-1].origin, phase="backward"))
    graph = replace(graph, nodes=(*graph.nodes[:-1], backward))
    for _ in range(2):
        with pytest.raises(PlanError):
            lower_cached(graph, Plan(dp=2, micro=4), GIVEN)
    assert len(lowered) == 2
    assert not list(home.iterdir())


# ---------------------------------------------------------------------- a cache that cannot be relied on


@pytest.mark.parametrize("keep", [0, 20, 400], ids=["empty", "cut_early", "cut_late"])
def test_a_damaged_file_is_replaced(home, lowered, keep):
    lower_cached(chain(), PLAN, GIVEN)
    (file,) = home.iterdir()
    file.write_bytes(file.read_bytes()[:keep])
    for _ in range(2):
        lower_cached(chain(), PLAN, GIVEN)
    assert len(lowered) == 2


def test_a_folder_that_others_can_write_to_is_not_read(home, lowered):
    lower_cached(chain(), PLAN, GIVEN)
    home.chmod(0o777)
    lower_cached(chain(), PLAN, GIVEN)
    assert len(lowered) == 2


def test_what_cannot_be_written_leaves_nothing_behind(home, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    assert lower_cached(chain(), PLAN, GIVEN).instructions
    assert not list(home.iterdir())


def test_a_folder_that_cannot_be_made_does_not_stop_a_run(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert lower_cached(chain(), PLAN, GIVEN).instructions


def test_what_was_not_used_for_longest_goes_first(home, lowered, monkeypatch):
    plans = [Plan(dp=n) for n in (2, 4, 8)]
    files = {}
    for at, plan in enumerate(plans[:2]):
        lower_cached(chain(), plan, GIVEN)
        (new,) = set(home.iterdir()) - set(files.values())
        os.utime(new, (at, at))
        files[plan] = new
    lower_cached(chain(), plans[0], GIVEN)  # used again
    room_for_two = sum(f.stat().st_size for f in files.values()) + 100
    monkeypatch.setattr(cache, "MOST_BYTES", room_for_two)
    lower_cached(chain(), plans[2], GIVEN)
    assert [plan for plan, file in files.items() if file.exists()] == [plans[0]]
    assert lowered == plans
