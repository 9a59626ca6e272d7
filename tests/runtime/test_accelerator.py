"""An accelerator keeps tensors on its devices, runs programs on them, and reads the results back. With real workers."""

import gc
import time
from collections.abc import Callable

import pytest
import torch

from moai.graph.placement import Partial, Placement, Replicate, Shard, split_evenly
from moai.graph.step_graph import Ref, Scalar, TensorType
from moai.lower.program import Instruction, PerRank, Program
from moai.runtime.accelerator import Accelerator
from moai.runtime.transport import pieces
from tests.runtime.programs import cpus, f32, increment, op, program, slot

OfSize = Callable[[int], Accelerator]
sizes = pytest.mark.parametrize("n", [1, 2, 3])


# Tensors to and fro.


@sizes
@pytest.mark.parametrize("placement", ["replicate", "partial", "rows", "columns", "on the last device only"])
def test_what_is_uploaded_is_read_back(accelerator: OfSize, n: int, placement: str) -> None:
    x = torch.randn(7, 5)
    lies: dict[str, Placement] = {
        "replicate": Replicate(),
        "partial": Partial(),
        "rows": Shard(0, split_evenly(7, n)),
        "columns": Shard(1, split_evenly(5, n)),
        "on the last device only": Shard(0, (0,) * (n - 1) + (7,)),
    }
    assert torch.equal(accelerator(n).read(accelerator(n).upload(x, lies[placement])), x)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64,
     torch.float8_e4m3fn],
)  # fmt: skip
def test_every_dtype_travels(accelerator: OfSize, dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (4, 3)).to(dtype)
    back = accelerator(2).read(accelerator(2).upload(x, Shard(0, (1, 3))))
    assert back.dtype == dtype and torch.equal(back.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_scalars_and_empty_tensors_travel(accelerator: OfSize, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    assert torch.equal(accelerator(2).read(accelerator(2).upload(x, Replicate())), x)


def test_large_and_strided_tensors_travel(accelerator: OfSize) -> None:
    x = torch.randn(1500, 4000)[:, ::2].t()
    for placement in (Replicate(), Shard(0, (1999, 1)), Shard(1, (700, 800))):
        assert torch.equal(accelerator(2).read(accelerator(2).upload(x, placement)), x)


def test_a_tensor_may_change_after_its_upload(accelerator: OfSize) -> None:
    a = accelerator(2)
    for n in (4, 1 << 20):
        x = torch.zeros(n)
        buffer = a.upload(x, Replicate())
        x.fill_(1)
        assert a.read(buffer).sum() == 0


def test_strided_tensors_are_sent_with_small_copies_only() -> None:
    x = torch.arange(24_000).reshape(2, 30, 400).transpose(0, 2)
    views = [bytes(piece) for piece in pieces(x, limit=1000)]
    assert max(map(len, views)) <= 1000
    assert b"".join(views) == bytes(next(pieces(x.contiguous(), limit=1 << 20)))


def test_a_split_that_does_not_fit_is_refused(accelerator: OfSize) -> None:
    with pytest.raises(ValueError, match=r"shape \[4\] cannot be split along dim 0 in parts of \(2, 3\)"):
        accelerator(2).upload(torch.ones(4), Shard(0, (2, 3)))


# Runs.


@sizes
def test_each_device_computes_on_its_part(accelerator: OfSize, n: int) -> None:
    x, rows = torch.randn(7, 2), Shard(0, split_evenly(7, n))
    p = program(n, [slot(0, f32(7, 2), rows)], [slot(1, f32(7, 2), rows)], op("aten.exp.default", Ref(0), outs=1))
    a = accelerator(n)
    (y,) = a.run(p, [a.upload(x, rows)], [])
    assert torch.equal(a.read(y), x.exp())


def collective(n: int, dtype: torch.dtype, local: torch.Tensor, out: tuple[int, ...], *body: Instruction) -> Program:
    """A program whose value 1 is `local` times (rank + 1), and whose result is value 2."""
    given = slot(0, TensorType(tuple(local.shape), dtype))
    scale = op("aten.mul.Scalar", Ref(0), PerRank(tuple(range(1, n + 1))), outs=1)
    return program(n, [given], [slot(2, TensorType(out, dtype))], scale, *body)


@sizes
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8]
)
def test_all_reduce_sums_over_devices(accelerator: OfSize, n: int, dtype: torch.dtype) -> None:
    x = torch.arange(6).reshape(2, 3).to(dtype)
    p = collective(n, dtype, x, (3, 2), op("aten.t.default", Ref(1), outs=3), op("all_reduce", Ref(3), outs=2))
    a = accelerator(n)
    for _ in range(2):
        (y,) = a.run(p, [a.upload(x, Replicate())], [])
        assert torch.equal(a.read(y), x.t() * sum(range(1, n + 1)))


@sizes
def test_a_started_reduction_keeps_order_and_shapes(accelerator: OfSize, n: int) -> None:
    x = torch.randn(2, 3)
    p = program(
        n,
        [slot(0, f32(2, 3))],
        [slot(4, f32(2, 3)), slot(5, f32(3, 2)), slot(6, f32())],
        op("aten.t.default", Ref(0), outs=1),
        op("aten.sum.default", Ref(0), outs=2),
        op("all_reduce_start", (Ref(0), Ref(1), Ref(2)), outs=3, frees=(1, 2)),
        op("wait", Ref(3), outs=(4, 5, 6), frees=(3,), shapes=((2, 3), (3, 2), ())),
    )
    a = accelerator(n)
    for _ in range(2):
        outs = a.run(p, [a.upload(x, Replicate())], [])
        for out, term in zip(outs, (x, x.t(), x.sum()), strict=True):
            torch.testing.assert_close(a.read(out), term * n)


@sizes
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16])
def test_all_gather_concatenates_uneven_parts(accelerator: OfSize, n: int, dim: int, dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (7, 5)).to(dtype)
    type = TensorType((7, 5), dtype)
    parts = {1: ((7,), (5,)), 2: ((5, 2), (0, 5)), 3: ((3, 4, 0), (1, 1, 3))}[n][dim]
    gather = op("all_gather", Ref(0), dim, parts, outs=1, shapes=((7, 5),))
    p = program(n, [slot(0, type, Shard(dim, parts))], [slot(1, type)], gather)
    a = accelerator(n)
    (y,) = a.run(p, [a.upload(x, Shard(dim, parts))], [])
    assert torch.equal(a.read(y), x)


@sizes
def test_a_donated_input_is_updated_in_place_and_consumed(accelerator: OfSize, n: int) -> None:
    a, type, rows = accelerator(n), f32(6, 2), Shard(0, split_evenly(6, n))
    p = increment(n, type, rows)
    first = a.upload(torch.zeros(6, 2), rows)
    (second,) = a.run(p, [first], [])
    (third,) = a.run(p, [second], [])
    assert torch.equal(a.read(third), torch.full((6, 2), 2.0))
    with pytest.raises(ValueError, match="donated to a run"):
        a.read(first)
    with pytest.raises(ValueError, match="donated to a run"):
        a.run(p, [second], [])


def test_an_input_that_is_kept_can_be_used_again(accelerator: OfSize) -> None:
    a = accelerator(2)
    p = program(2, [slot(0, f32(2))], [slot(1, f32(2))], op("aten.neg.default", Ref(0), outs=1))
    x = a.upload(torch.ones(2), Replicate())
    for _ in range(3):
        assert a.read(a.run(p, [x], [])[0]).tolist() == [-1, -1]


def test_scalars_travel_with_each_run(accelerator: OfSize) -> None:
    a = accelerator(2)
    p = program(
        2, [], [slot(0, f32(1))], op("aten.full.default", (1,), Scalar(0), outs=0, dtype=torch.float32), n_scalars=1
    )
    assert [a.read(a.run(p, [], [s])[0]).item() for s in (0.5, 2, -1e-3)] == pytest.approx([0.5, 2, -1e-3])


def test_partial_results_are_summed_when_read(accelerator: OfSize) -> None:
    a = accelerator(3)
    full = op("aten.full.default", (2,), PerRank((1, 10, 100)), outs=0, dtype=torch.float32)
    (y,) = a.run(program(3, [], [slot(0, f32(2), Partial())], full), [], [])
    assert a.read(y).tolist() == [111, 111]


def test_inputs_that_do_not_suit_the_program_are_refused(accelerator: OfSize) -> None:
    a = accelerator(2)
    p = increment(2, f32(4))
    with pytest.raises(ValueError, match=r"input 0 .* float32\[4\]@R, but was given Buffer\(float32\[4\]@S0\)"):
        a.run(p, [a.upload(torch.ones(4), Shard(0, (2, 2)))], [])
    with pytest.raises(ValueError, match=r"= \(2, 1, 0\), but was given \(2, 0, 0\)"):
        a.run(p, [], [])


def test_one_buffer_cannot_be_given_twice_where_it_may_be_overwritten(accelerator: OfSize) -> None:
    a = accelerator(2)
    both = [slot(0, f32(2), donated=True), slot(1, f32(2))]
    p = program(2, both, [slot(0, f32(2), replaces=0)], op("aten.add_.Tensor", Ref(0), Ref(1)))
    x = a.upload(torch.ones(2), Replicate())
    with pytest.raises(ValueError, match="one buffer twice"):
        a.run(p, [x, x], [])


def test_buffers_of_another_accelerator_are_refused(accelerator: OfSize) -> None:
    x = accelerator(1).upload(torch.ones(2), Replicate())
    with pytest.raises(ValueError, match="another accelerator"):
        accelerator(2).read(x)


# What is sent, and when.


@pytest.fixture
def sent(accelerator: OfSize, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of messages that device 0 of the accelerator of two is sent."""
    link, kinds = accelerator(2)._links[0], []
    post = link.post

    def recording(command: bytes, *args, **kwargs) -> int:
        kinds.append(next(k for k in ("Load", "Put", "Run", "Read", "Free", "Ping") if k.encode() in command[:120]))
        return post(command, *args, **kwargs)

    monkeypatch.setattr(link, "post", recording)
    return kinds


def test_a_program_is_shipped_once(accelerator: OfSize, sent: list[str]) -> None:
    a = accelerator(2)
    x, p = a.upload(torch.zeros(2), Replicate()), increment(2, f32(2))
    for _ in range(3):
        (x,) = a.run(p, [x], [])
    assert sent.count("Load") == 1 and sent.count("Run") == 3


def test_another_program_of_the_same_name_is_refused(accelerator: OfSize) -> None:
    a, x = accelerator(2), accelerator(2).upload(torch.zeros(2), Replicate())
    p = increment(2, f32(2))
    twin = Program(p.name, 2, p.inputs, p.outputs, 0, (), 0, 0)
    (x,) = a.run(p, [x], [])
    with pytest.raises(ValueError, match="another program named"):
        a.run(twin, [x], [])


def test_a_dropped_buffer_is_freed_on_the_devices(accelerator: OfSize) -> None:
    a = accelerator(2)
    x = a.upload(torch.ones(64 << 20), Shard(0, (64 << 20, 0)))
    a.read(a.upload(torch.ones(1), Replicate()))  # comes after it
    with_it = a.memory()
    del x
    gc.collect()
    a.read(a.upload(torch.ones(1), Replicate()))  # sends what is to be freed, and waits
    without = a.memory()
    assert with_it[0][0] - without[0][0] > 250 << 20


def test_resident_bytes_are_those_of_live_buffers_on_the_fullest_device(accelerator: OfSize) -> None:
    a = accelerator(2)
    gc.collect()
    a.synchronize()
    before = a.resident_bytes
    whole = a.upload(torch.ones(100), Replicate())
    split = a.upload(torch.ones(10, 4), Shard(0, (7, 3)))
    assert a.resident_bytes - before == 100 * 4 + 7 * 4 * 4
    (whole,) = a.run(increment(2, f32(100)), [whole], [])  # in place: nothing more is held
    p = program(2, [slot(0, f32(100))], [slot(1, f32(100))], op("aten.neg.default", Ref(0), outs=1))
    (negative,) = a.run(p, [whole], [])
    assert a.resident_bytes - before == 2 * 100 * 4 + 7 * 4 * 4
    del whole, split, negative
    gc.collect()
    a.synchronize()
    assert a.resident_bytes == before


def test_a_run_returns_at_once_but_never_more_than_one_ahead(accelerator: OfSize) -> None:
    a = accelerator(2)
    work = [op("aten.mm.default", Ref(0), Ref(0), outs=1), op("aten.sum.default", Ref(1), outs=2, frees=(1,))]
    p = program(2, [slot(0, f32(2000, 2000))], [slot(2, f32())], *work)
    x = a.upload(torch.zeros(2000, 2000), Replicate())
    a.run(p, [x], [])
    a.synchronize()
    start = time.perf_counter()
    a.run(p, [x], [])
    first = time.perf_counter() - start
    a.run(p, [x], [])
    second = time.perf_counter() - start - first
    a.synchronize()
    both = time.perf_counter() - start
    assert first < both / 5 and second > both / 4


def test_memory_and_pulses_tell_what_the_devices_do(accelerator: OfSize) -> None:
    a = accelerator(2)
    time.sleep(1.5)
    for (used, peak), pulse in zip(a.memory(), a.pulses, strict=True):
        assert 0 < used <= peak
        assert pulse is not None and pulse.cpu_seconds > 0 and 0 <= pulse.busy <= 1


def test_workers_are_on_the_loopback_interface(accelerator: OfSize) -> None:
    assert all(address.startswith("127.0.0.1:") for address in accelerator(2).addresses)
    assert len(set(accelerator(2).addresses)) == 2


def test_an_accelerator_that_is_closed_says_so() -> None:
    a = Accelerator(cpus(1))
    a.close()
    a.close()
    with pytest.raises(RuntimeError, match="closed"):
        a.upload(torch.ones(1), Replicate())


def test_an_accelerator_needs_devices() -> None:
    with pytest.raises(ValueError, match="at least one device"):
        Accelerator([])
