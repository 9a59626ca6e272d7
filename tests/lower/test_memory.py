"""The predicted peak is what workers count; what a loop hands on, exchanges hold and kernels work in is part of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moai.graph.placement import TIME
from moai.graph.step_graph import Ref, TensorType
from moai.lower import Program, lower
from moai.lower.coordinates import per_ranks
from moai.lower.layouts import Laid, dense, results
from moai.lower.peak import peak_bytes
from moai.lower.program import PerRank
from moai.lower.workspaces import workspace
from moai.plan.parse import parse
from moai.runtime.accelerator import Accelerator
from moai.runtime.measure import VARIABLE
from tests.capture.conftest import capture, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import Step, capturing, llama_with_adamw
from tests.runtime.programs import TERMS, cpus, f32, mesh, op, program, slot, split

OVER, UNDER = 0.05, 0.03
KB = 1024

# ---------------------------------------------------------------------- a real step on two workers

PLANS = [
    "dp=2",
    "tp=2",
    "dp=2,micro=4",
    "tp=2,micro=2,recompute=full",
    "dp=2,recompute=default",
    "dp=2,distribute_param=true",
    "dp=2,micro=4,distribute_param=true",
    "dp=2,distribute_param=true,distribute_low_prec_param=true,recompute=full",
    "dp=2,micro=4,distribute_param=true,distribute_low_prec_param=true,recompute=full",
    "dp=2,precision=bf16",
    "tp=2,micro=2,precision=bf16",
    "pp=2,micro=8,schedule=gpipe",
    "pp=2,micro=8,schedule=zero_bubble",
]
a_step = llama_with_adamw(
    batch=32,
    length=64,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
    max_position_embeddings=64,
)


@pytest.fixture
def step(capture, monkeypatch) -> Step:  # noqa: F811
    return capturing(capture, monkeypatch)(a_step)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Accelerator, Path]]:
    """Two workers that count, and the folder of their counts."""
    folder = tmp_path_factory.mktemp("counts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder / "memory"))
        patch.setenv("MOAI_COMPILE", "never")
        accelerator = Accelerator(cpus(2))
    yield accelerator, folder
    accelerator.close()


@pytest.mark.parametrize("text", PLANS)
def test_the_predicted_peak_is_the_counted_one(step, counting, text: str) -> None:
    accelerator, folder = counting
    program = lower(step.graph, parse(text, 2), [None] * len(step.graph.inputs))
    inputs = [
        accelerator.upload(torch.zeros(s.type.shape, dtype=s.type.dtype), s.placement, program.mesh)
        for s in program.inputs
    ]
    accelerator.run(program, inputs, step.scalars)
    accelerator.synchronize()
    lines = [json.loads(line) for file in folder.iterdir() for line in file.open()]
    counted = [line["counted"] for line in lines if line["program"] == program.name]
    assert len(counted) == 2 and max(counted) > 8 << 20
    assert 1 - UNDER < program.peak_bytes / max(counted) < 1 + OVER


@pytest.mark.parametrize("text", ["dp=3,tp=2,micro=5", "dp=5,tp=4", "dp=6,shard=3,distribute_param=true,micro=2"])
def test_nobody_has_longer_parts_than_the_first_device_in_its_first_pass(step, text: str) -> None:
    devices = math.prod(int(item[3:]) for item in text.split(",") if item[:3] in ("dp=", "tp="))
    program = lower(step.graph, parse(text, devices), [None] * len(step.graph.inputs))
    lengths = [n for i in program.instructions for n in per_ranks(i.shapes)]
    assert lengths
    assert all(n.values[0] == max(n.values) for n in lengths)


# ---------------------------------------------------------------------- what is part of a peak


def peak(found: Program, **types: TensorType) -> int:
    return peak_bytes(found, {int(name[1:]): type_ for name, type_ in types.items()})


BIG = f32(256)  # 1 KiB


def test_an_input_that_is_not_donated_stays() -> None:
    steps = [op("aten.neg.default", Ref(k), outs=k + 1, frees=(k,) * (k > 0), shapes=((256,),)) for k in range(3)]
    kept = program(1, [slot(0, BIG)], [slot(3, BIG)], *steps)
    assert peak(kept) == 3 * KB


def test_a_donated_input_is_gone_after_its_last_use() -> None:
    steps = [op("aten.neg.default", Ref(k), outs=k + 1, frees=(k,), shapes=((256,),)) for k in range(3)]
    donated = program(1, [slot(0, BIG, donated=True)], [slot(3, BIG)], *steps)
    assert peak(donated) == 2 * KB


def test_a_reshape_takes_memory_only_where_entries_lie_apart() -> None:
    def of(*dims: int) -> int:
        permuted = op("aten.permute.default", Ref(0), dims, outs=1, shapes=((16, 16),))
        flat = op("aten.reshape.default", Ref(1), (256,), outs=2, shapes=((256,),))
        return peak(program(1, [slot(0, f32(16, 16))], [], permuted, flat))

    assert of(0, 1) == KB
    assert of(1, 0) == 2 * KB


def test_a_bucket_is_one_memory_and_a_sum_in_place_takes_no_other() -> None:
    memory = op("bucket", ((256,), (256,)), torch.float32, outs=(1, 2), shapes=((256,), (256,)))
    start = op("all_reduce_start", (Ref(1), Ref(2)), ("dp",), outs=3, in_place=True)
    wait = op("wait", Ref(3), outs=(), frees=(3,))
    assert peak(program(2, [], [slot(1, BIG), slot(2, BIG)], memory, start, wait)) == 4 * KB  # outputs are copied apart
    assert peak(program(2, [], [], memory, start, wait)) == 2 * KB


def test_parts_that_are_gathered_lie_in_a_message_first() -> None:
    gather = op("all_gather", Ref(0), ("dp",), 1, (8, 8), 1, outs=1, shapes=((16, 16),))
    assert peak(program(2, [slot(0, f32(16, 16), split(1, (8, 8)))], [], gather)) == (512 + KB) + KB
    rows = op("all_gather", Ref(0), ("dp",), 0, (8, 8), 1, outs=1, shapes=((16, 16),))
    assert peak(program(2, [slot(0, f32(16, 16), split(0, (8, 8)))], [], rows)) == 512 + KB


def test_terms_that_are_scattered_are_sent_and_received() -> None:
    scatter = op("reduce_scatter", Ref(0), ("dp",), 0, (8, 8), 1, outs=1, shapes=((8, 16),))
    assert peak(program(2, [slot(0, f32(16, 16), TERMS)], [], scatter)) == KB + 2 * KB + 512


def in_passes(steps: int, *body) -> Program:
    part = op(
        "aten.slice.Tensor",
        Ref(0),
        0,
        PerRank((TIME,), tuple(256 * k for k in range(steps))),
        PerRank((TIME,), tuple(256 * (k + 1) for k in range(steps))),
        outs=1,
        shapes=((256,),),
    )
    neg = op("aten.neg.default", Ref(1), outs=2, frees=(1,), shapes=((256,),))
    whole = slot(0, f32(256 * steps))
    return program(mesh(dp=1, micro=steps), [whole], [], op("repeat"), part, neg, *body, op("end_repeat"))


def test_a_sum_over_passes_takes_one_of_them() -> None:
    added = op("accumulate", Ref(2), True, outs=3, frees=(2,), shapes=((256,),))
    assert peak(in_passes(5, added)) == 5 * KB + 2 * KB  # the input, the sum, and what is added to it


def test_a_list_holds_all_passes() -> None:
    assert peak(in_passes(5, op("collect", Ref(2), outs=3, frees=(2,)))) == 5 * KB + 5 * KB


def test_attention_in_halves_with_shared_heads_repeats_them_in_its_backward() -> None:
    def needed(kv: int, dtype: torch.dtype) -> int:
        q, k, lse = dense((2, 4, 8, 16), dtype), dense((2, kv, 8, 16), dtype), dense((2, 4, 8), torch.float32)
        return workspace("moai.sdpa_backward.default", (q, q, k, k, q, lse, None, True, None, kv < 4))

    assert needed(4, torch.bfloat16) == needed(2, torch.float32) == 0
    assert needed(2, torch.bfloat16) == 4 * dense((2, 4, 8, 16), torch.bfloat16).nbytes


def test_a_product_copies_factors_whose_batch_dims_are_not_one() -> None:
    heads_first, heads_last = (
        Laid((2, 4, 8, 16), stride, torch.float32) for stride in [(512, 128, 16, 1), (512, 16, 64, 1)]
    )
    assert workspace("moai.matmul.default", (heads_first, heads_first)) == 0
    assert workspace("moai.matmul.default", (heads_first, heads_last)) == heads_last.nbytes


# ---------------------------------------------------------------------- layouts


def test_views_share_the_memory_of_their_argument() -> None:
    x = dense((4, 6), torch.float32)
    permuted = results("aten.permute.default", (x, (1, 0)), {})
    assert (permuted.shares, permuted.laid.stride) == (0, (1, 6))
    assert results("aten.reshape.default", (permuted.laid, (24,)), {}).shares is None


def test_equal_numbers_of_different_kinds_are_told_apart() -> None:
    x = dense((4,), torch.int64)
    dtypes = [results("aten.mul.Scalar", (x, n), {}).laid.dtype for n in (1, 1.0, True)]
    assert dtypes == [torch.int64, torch.float32, torch.int64]


# ---------------------------------------------------------------------- what stages hold

TURNS = mesh(pp=2, micro=4)
NUMBERS = PerRank((TIME,), (0, 1, 2, 3))


def in_turns(*order: tuple[int, int]) -> Program:
    """A forward that makes a KiB, and a backward that takes it."""
    forward = [op("aten.neg.default", Ref(0), outs=1, shapes=((256,),)), op("collect", Ref(1), outs=2, frees=(1,))]
    backward = op("take", Ref(2), outs=3, frees=(3,), shapes=((256,),))
    begin = op("begin_part")
    loop = [op("repeat", order), begin, *forward, begin, backward, op("end_repeat", frees=(2,))]
    return program(TURNS, [slot(0, BIG)], [], *loop)


def test_as_many_passes_are_held_as_are_under_way() -> None:
    types = {"v1": BIG, "v3": BIG}
    one_by_one = [(part, step) for step in range(4) for part in (0, 1)]
    all_first = [(part, step) for part in (0, 1) for step in range(4)]
    in_pairs = [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (0, 3), (1, 2), (1, 3)]
    found = [peak(in_turns(*order), **types) for order in (one_by_one, in_pairs, all_first)]
    assert found == [2 * KB, 3 * KB, 5 * KB]


def test_a_message_is_received_ahead() -> None:
    receive = op("receive", 0, NUMBERS, ((256,),), torch.float32, outs=(1,), frees=(1,), shapes=((256,),))
    assert peak(program(TURNS, [], [], op("repeat"), receive, op("end_repeat")), v1=BIG) == 2 * KB


def test_a_message_is_held_until_it_has_arrived() -> None:
    """That is known when there is the next one."""
    code = op("repeat"), op("send", (Ref(0),), 1), op("end_repeat")
    assert peak(program(TURNS, [slot(0, BIG)], [], *code)) == 3 * KB
