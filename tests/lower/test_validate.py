"""The validator finds what must not run, and nothing in what the lowering makes of a real step for 512 devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moai.graph.placement import REPLICATE, TIME, Placement
from moai.graph.step_graph import Ref, TensorType
from moai.lower import Program, lower
from moai.lower.coordinates import diff, explanation, representatives
from moai.lower.program import PerRank
from moai.lower.validate import InvalidProgram, validate
from moai.plan.parse import parse
from tests.capture.conftest import capture, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import capturing, llama_with_adamw
from tests.runtime.programs import TERMS, each, f32, mesh, op, program, slot, split

BATCH = 1030  # which neither 512 nor 64 x 2 divides

# ---------------------------------------------------------------------- a real step on 512 devices

PLANS = [
    "dp=1",
    "dp=512",
    "dp=128,tp=4",
    "dp=64,tp=8",
    "dp=64,tp=8,micro=3",
    "dp=512,recompute=full",
    "dp=512,micro=2,recompute=default",
    "dp=512,precision=bf16",
    "dp=512,distribute_param=true",
    "dp=512,distribute_param=true,distribute_low_prec_param=true",
    "dp=512,distribute_param=true,distribute_low_prec_param=true,shard=8,recompute=full",
    "dp=64,tp=8,distribute_param=true,shard=8",
    "dp=128,tp=4,micro=2,recompute=full,precision=bf16",
    "dp=64,tp=8,micro=2,recompute=default,distribute_param=true,distribute_low_prec_param=true,precision=bf16",
]
# A model with fewer key/value heads than devices, and a vocabulary that no number of them divides.
two_layers = llama_with_adamw(
    batch=BATCH,
    length=4,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=251,
    max_position_embeddings=16,
)


@pytest.fixture
def lowered(capture, monkeypatch) -> Callable[[str], Program]:  # noqa: F811
    """Lowers the step with a plan; the lowering validates with the types of all values."""
    graph = capturing(capture, monkeypatch)(two_layers).graph
    monkeypatch.setenv("MOAI_VALIDATE", "1")

    def lower_(text: str) -> Program:
        plan = parse(text, math.prod(int(item[3:]) for item in text.split(",") if item[:3] in ("dp=", "tp=")))
        return lower(graph, plan, [None] * len(graph.inputs))

    return lower_


@pytest.mark.parametrize("text", PLANS)
def test_a_step_on_many_devices_is_valid(lowered, text: str) -> None:
    lowered(text)


@pytest.mark.parametrize("text", PLANS[1:])
def test_devices_differ_in_nothing_but_their_parts(lowered, text: str) -> None:
    found = lowered(text)
    first, *others = representatives(found)
    passes = {0, found.mesh.steps - 1}
    at = found.mesh.coordinates
    differences = [d for r in others for step in passes for d in diff(found, at(first), at(r, step))]
    assert differences
    assert not [str(d) for d in differences if explanation(d) is None]


def test_the_lowering_validates_what_it_makes_if_asked_to(lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("moai.lower.lowering.validate", lambda program, types: seen.append(program))
    asked = lowered("dp=2")
    monkeypatch.setenv("MOAI_VALIDATE", "0")
    lowered("dp=2")
    assert seen == [asked]


# ---------------------------------------------------------------------- which devices stand for all


def test_every_length_of_a_tensor_is_looked_at() -> None:
    uneven = each(2, 2, 1, 2, 2)
    found = program(5, [slot(0, f32(9), split(0, (2, 2, 1, 2, 2)))], [], op("aten.neg.default", Ref(0), outs=1))
    found = replace(found, instructions=(replace(found.instructions[0], shapes=((uneven,),), frees=(1,)),))
    assert representatives(found) == [0, 2, 4]


# ---------------------------------------------------------------------- what is found


def refused(found: Program, because: str, types: dict[int, TensorType] | None = None) -> None:
    with pytest.raises(InvalidProgram, match=because):
        validate(found, types)


HALF = split(0, (2, 2))
NEG = "aten.neg.default"


def test_a_wrong_shape() -> None:
    claim = op(NEG, Ref(0), outs=1, shapes=((3,),))
    refused(program(2, [slot(0, f32(4), HALF)], [slot(1, f32(4), HALF)], claim), r"\[2\], and was to be of shape \[3\]")


def test_a_wrong_shape_on_the_last_device_only() -> None:
    part = op("aten.slice.Tensor", Ref(0), 0, each(0, 2), each(2, 3), outs=1, shapes=((2,),))
    out = op("aten.clone.default", Ref(1), outs=2, shapes=((2,),))
    refused(program(2, [slot(0, f32(4))], [slot(2, f32(4), HALF)], part, out), r"device 1.*\[1\]")


def test_a_wrong_dtype() -> None:
    claim = op(NEG, Ref(0), outs=1, shapes=((4,),), frees=(1,))
    refused(program(1, [slot(0, f32(4))], [], claim), "was to be torch.int64", {1: TensorType((4,), torch.int64)})


def test_a_wrong_output() -> None:
    ended = op("aten.sum.default", Ref(0), outs=1, shapes=((),))
    refused(program(1, [slot(0, f32(4))], [slot(1, f32(1))], ended), r"output %1 is float32\[\]")


def test_tensors_that_an_operator_does_not_take() -> None:
    wrong = op("aten.mm.default", Ref(0), Ref(0), outs=1, shapes=((2, 3),))
    refused(program(1, [slot(0, f32(2, 3))], [slot(1, f32(2, 3))], wrong), r"fails on \(float32\[2,3\]")


def test_grouped_products_in_fp32_are_valid() -> None:
    product = op("aten._grouped_mm.default", Ref(0), Ref(1), Ref(2), outs=3, shapes=((6, 8),))
    inputs = [slot(0, f32(6, 4)), slot(1, f32(2, 4, 8)), slot(2, TensorType((2,), torch.int32))]
    validate(program(1, inputs, [slot(3, f32(6, 8))], product))


def test_a_use_after_the_end() -> None:
    gone = op(NEG, Ref(0), outs=1, shapes=((4,),), frees=(0,))
    again = op(NEG, Ref(0), outs=2, shapes=((4,),))
    refused(program(1, [slot(0, f32(4), donated=True)], [slot(2, f32(4))], gone, again), "%0 is used, but is gone")


def test_an_output_that_is_never_written() -> None:
    refused(program(1, [slot(0, f32(4))], [slot(1, f32(4))]), "output %1 is never written")


def test_an_input_that_was_to_stay_is_overwritten() -> None:
    refused(program(1, [slot(0, f32(4))], [], op("aten.neg_.default", Ref(0))), "an input that is to stay")


def test_what_is_overwritten_is_still_read_elsewhere() -> None:
    view = op("aten.view.default", Ref(0), (2, 2), outs=1, shapes=((2, 2),))
    ended = op("aten.neg_.default", Ref(0))
    outs = [slot(0, f32(4)), slot(1, f32(2, 2))]
    refused(program(1, [slot(0, f32(4), donated=True)], outs, view, ended), "shares memory with %1")


def test_outputs_in_one_memory() -> None:
    view = op("aten.view.default", Ref(0), (2, 2), outs=1, shapes=((2, 2),))
    outs = [slot(0, f32(4)), slot(1, f32(2, 2))]
    refused(program(1, [slot(0, f32(4), donated=True)], outs, view), "shares memory with")


def test_a_number_that_depends_on_the_pass_outside_of_a_loop() -> None:
    part = op("aten.slice.Tensor", Ref(0), 0, PerRank((TIME,), (0, 2)), 4, outs=1, shapes=((2,),))
    refused(program(mesh(dp=1, micro=2), [slot(0, f32(4))], [slot(1, f32(2))], part), "stands in no loop")


# -- collectives


def summed(xs, **kwargs):
    return op("all_reduce_start", xs, ("dp",), outs=9, **kwargs)


def test_peers_that_sum_tensors_of_different_lengths() -> None:
    sum_ = op("all_reduce", Ref(0), ("dp",), "sum", outs=1, shapes=((each(2, 1),),))
    refused(program(2, [slot(0, f32(3), split(0, (2, 1)))], [], sum_), r"lengths \[2, 1\]")


def test_parts_that_are_gathered_as_other_parts() -> None:
    gather = op("all_gather", Ref(0), ("dp",), 0, (1, 2), 1, outs=1, shapes=((3,),))
    refused(program(2, [slot(0, f32(3), split(0, (2, 1)))], [], gather), r"\[2, 1\] are gathered as \[1, 2\]")


def test_a_sum_that_is_scattered_in_parts_of_another_length() -> None:
    scatter = op("reduce_scatter", Ref(0), ("dp",), 0, (2, 3), 1, outs=1, shapes=((each(2, 3),),))
    refused(program(2, [slot(0, f32(4), TERMS)], [], scatter), r"a length of 4 is scattered as \[2, 3\]")


def test_a_sum_that_nobody_waits_for() -> None:
    refused(program(2, [slot(0, f32(4), TERMS)], [], summed((Ref(0),))), "nobody waits for %9")


def in_a_bucket(*between, written: bool = True) -> Program:
    """Two terms in one bucket, summed in place."""
    memory = op("bucket", ((2,), (3,)), torch.float32, outs=(1, 2), shapes=((2,), (3,)))
    first = op("aten.copy_.default", Ref(1), Ref(0))
    second = (
        op("aten.fill_.Scalar", Ref(2), 0.0) if not written else op("aten.zeros.default", (3,), outs=3, shapes=((3,),))
    )
    rest = op("aten.copy_.default", Ref(2), Ref(3), frees=(3,))
    start = summed((Ref(1), Ref(2)), in_place=True)
    wait = op("wait", Ref(9), outs=(), frees=(9,))
    code = (memory, first, second, *[rest] * written, start, *between, wait)
    return program(2, [slot(0, f32(2), TERMS)], [slot(1, f32(2)), slot(2, f32(3))], *code)


def test_a_bucket_all_of_which_is_written_is_valid() -> None:
    validate(in_a_bucket())


def test_a_part_of_a_bucket_that_is_read_before_it_is_written() -> None:
    refused(in_a_bucket(written=False), "%2 is read before all of it was written")


def test_what_is_touched_while_it_is_summed() -> None:
    refused(in_a_bucket(op("aten.neg_.default", Ref(1))), "%1 is touched while devices exchange it")


# -- loops


def in_a_loop(*body, outs=(), donated: bool = False) -> Program:
    whole = slot(0, f32(3), REPLICATE, donated=donated)
    return program(mesh(dp=1, micro=2), [whole], list(outs), op("repeat"), *body, op("end_repeat"))


def passes(*values: int) -> PerRank:
    return PerRank((TIME,), values)


PART = op("aten.slice.Tensor", Ref(0), 0, passes(0, 2), passes(2, 3), outs=1, shapes=((passes(2, 1),),))


def test_a_sum_over_passes_of_different_lengths() -> None:
    added = op("accumulate", Ref(1), False, outs=2, frees=(1,), shapes=((2,),))
    refused(in_a_loop(PART, added, outs=[slot(2, f32(2))]), r"a pass adds float32\[1\] to float32\[2\]")


def test_a_sum_that_begins_in_the_memory_of_an_input() -> None:
    view = op("aten.view.default", Ref(0), (3,), outs=1, shapes=((3,),))
    added = op("accumulate", Ref(1), True, outs=2, frees=(1,), shapes=((3,),))
    refused(in_a_loop(view, added, outs=[slot(2, f32(3))]), "begins in the memory of %1")


def test_a_loop_that_overwrites_what_comes_from_outside() -> None:
    refused(in_a_loop(op("aten.neg_.default", Ref(0)), donated=True), "comes from outside")


def test_a_pass_that_uses_what_the_pass_before_has_freed() -> None:
    refused(in_a_loop(op(NEG, Ref(0), outs=1, shapes=((3,),), frees=(0, 1)), donated=True), "comes from outside")


def test_parts_joined_behind_a_loop_are_valid() -> None:
    collect = op("collect", Ref(1), outs=2, frees=(1,))
    joined = op("join", Ref(2), 0, outs=3, frees=(2,), shapes=((3,),))
    loop = in_a_loop(PART, collect)
    validate(replace(loop, instructions=(*loop.instructions, joined), outputs=(slot(3, f32(3)),)))


# ---------------------------------------------------------------------- differences


@pytest.mark.parametrize(
    "wrong",
    [
        op("aten.mul.Scalar", Ref(0), each(1, 2), outs=1),
        op("aten.sum.dim_IntList", Ref(0), (each(0, 1),), outs=1),
        op("aten.transpose.int", Ref(0), each(0, 1), 1, outs=1),
    ],
)
def test_other_differences_between_devices_are_not_explained(wrong) -> None:
    found = program(2, [slot(0, f32(2, 2))], [slot(1, f32(2, 2), Placement())], wrong)
    (difference,) = diff(found, {"dp": 0}, {"dp": 1})
    assert explanation(difference) is None
