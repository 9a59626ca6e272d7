"""A plan is no mere word: what it asks for is seen in the program that every device runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from moai.graph.placement import TIME
from moai.lower import Program, lower
from moai.plan.plan import Plan
from tests.capture.conftest import capture  # noqa: F401 (fixture)
from tests.lower.captured_steps import capturing, llama_with_adamw, sizes

# Large enough that states are gathered layer by layer.
SIZES = {**sizes(layers=4), "hidden_size": 192, "intermediate_size": 512}
BATCH, SEQUENCE = 20, 32
Lowered = Callable[[Plan], Program]

# The second step is an ordinary one: the optimizer has its states.
two_steps = llama_with_adamw(BATCH, SEQUENCE, times=2, **SIZES)


@pytest.fixture
def reads_on_the_host() -> bool:
    """The model looks at its mask, which would be the end of a segment."""
    return True


@pytest.fixture
def lowered(capture, monkeypatch) -> Lowered:  # noqa: F811
    """Lowers the training step with a plan."""
    graph = capturing(capture, monkeypatch)(two_steps).graph
    return lambda plan: lower(graph, plan, [None] * len(graph.inputs))


def ops(program: Program) -> Counter[str]:
    return Counter(i.op for i in program.instructions)


def axes_of_collectives(program: Program) -> set[tuple[str, ...]]:
    collectives = ("all_reduce", "all_gather", "reduce_scatter")
    return {i.args[1] for i in program.instructions if i.op.removesuffix("_start") in collectives}


def test_dp_gives_each_device_its_samples_and_the_whole_state(lowered: Lowered) -> None:
    one, two = lowered(Plan()), lowered(Plan(dp=2))
    (tokens,) = {str(s.placement) for s in two.inputs if s.type.shape[:1] == (BATCH,)}
    assert tokens == "S0(dp)"
    assert two.resident_bytes == pytest.approx(one.resident_bytes, rel=0.01)
    assert two.peak_bytes - two.resident_bytes < 0.7 * (one.peak_bytes - one.resident_bytes)
    assert axes_of_collectives(two) == {("dp",)}


def test_tp_splits_the_matrices_and_their_states(lowered: Lowered) -> None:
    one, two = lowered(Plan()), lowered(Plan(tp=2))
    assert two.resident_bytes < 0.55 * one.resident_bytes
    assert axes_of_collectives(two) == {("tp",)}


def test_micro_batches_are_passes_of_a_loop_which_need_less_memory(lowered: Lowered) -> None:
    one, four = lowered(Plan()), lowered(Plan(micro=4))
    assert four.mesh.sizes[TIME] == 4
    names = [i.op for i in four.instructions]
    bounds = [at for at, name in enumerate(names) if name in ("repeat", "end_repeat")]
    inside = [name for a, b in zip(bounds[::2], bounds[1::2], strict=True) for name in names[a:b]]
    assert inside.count("aten.mm.default") == names.count("aten.mm.default") > 0
    assert four.peak_bytes - four.resident_bytes < 0.5 * (one.peak_bytes - one.resident_bytes)


@pytest.mark.parametrize("level", ["default", "full"])
def test_recomputation_needs_less_memory_and_computes_more(lowered: Lowered, level: str) -> None:
    none, some = lowered(Plan()), lowered(Plan(recompute=level))  # type: ignore[arg-type]
    assert some.peak_bytes < 0.9 * none.peak_bytes
    assert sum(ops(some).values()) > sum(ops(none).values())


def test_distribute_param_splits_parameters_and_states(lowered: Lowered) -> None:
    whole, split = lowered(Plan(dp=2)), lowered(Plan(dp=2, distribute_param=True))
    assert split.resident_bytes < 0.55 * whole.resident_bytes


def test_distribute_low_prec_param_gathers_again_and_keeps_less(lowered: Lowered) -> None:
    kept = lowered(Plan(dp=2, distribute_param=True))
    dropped = lowered(Plan(dp=2, distribute_param=True, distribute_low_prec_param=True))
    assert dropped.resident_bytes == kept.resident_bytes
    assert dropped.peak_bytes < kept.peak_bytes
    assert ops(dropped)["all_gather_start"] > ops(kept)["all_gather_start"]


def test_bf16_computes_products_in_bf16_and_keeps_the_state(lowered: Lowered) -> None:
    fp32, bf16 = lowered(Plan()), lowered(Plan(precision="bf16"))
    assert bf16.resident_bytes == fp32.resident_bytes
    assert bf16.peak_bytes < fp32.peak_bytes
    weights = sum(len(s.type.shape) == 2 and s.type.dtype == torch.float32 for s in bf16.inputs) / 3 - 1
    cast = sum(i.kwargs.get("dtype") == torch.bfloat16 for i in bf16.instructions if i.op == "aten._to_copy.default")
    assert cast >= weights  # all but the embedding's
