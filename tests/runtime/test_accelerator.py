"""An accelerator keeps tensors on its devices, runs programs on them, and reads the results back. With real workers."""

import gc
import time
from collections.abc import Callable

import pytest
import torch

from moai.graph.placement import REPLICATE, Placement, Shard, split_evenly
from moai.graph.step_graph import Ref, Scalar
from moai.lower.program import PerRank, Program
from moai.runtime.accelerator import Accelerator
from moai.runtime.transport import pieces
from tests.lower import lockstep
from tests.runtime.programs import TERMS, cpus, each, f32, increment, mesh, op, program, put, slot, split

OfSize = Callable[[int], Accelerator]
sizes = pytest.mark.parametrize("n", [1, 2, 3])


# Tensors to and fro.


@sizes
@pytest.mark.parametrize("placement", ["replicate", "partial", "rows", "columns", "on the last device only"])
def test_what_is_uploaded_is_read_back(accelerator: OfSize, n: int, placement: str) -> None:
    x = torch.randn(7, 5)
    lies: dict[str, Placement] = {
        "replicate": REPLICATE,
        "partial": TERMS,
        "rows": split(0, split_evenly(7, n)),
        "columns": split(1, split_evenly(5, n)),
        "on the last device only": split(0, (0,) * (n - 1) + (7,)),
    }
    assert torch.equal(accelerator(n).read(put(accelerator(n), x, lies[placement])), x)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64,
     torch.float8_e4m3fn],
)  # fmt: skip
def test_every_dtype_travels(accelerator: OfSize, dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (4, 3)).to(dtype)
    back = accelerator(2).read(put(accelerator(2), x, split(0, (1, 3))))
    assert back.dtype == dtype and torch.equal(back.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_scalars_and_empty_tensors_travel(accelerator: OfSize, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    assert torch.equal(accelerator(2).read(put(accelerator(2), x)), x)


GRID = mesh(dp=2, tp=2)
OVER_TWO_DIMS = Placement((Shard(0, ("dp",), (5, 3)), Shard(1, ("tp",), (1, 2), blocks=2)))


@pytest.mark.parametrize(
    "lies",
    [
        split(0, (1, 0, 4, 3), "dp", "tp"),
        split(1, (1, 2, 3, 0), "tp", "dp"),
        split(1, (2, 1), "tp", blocks=2),
        OVER_TWO_DIMS,
        Placement((Shard(0, ("tp",), (2, 6)), Shard(1, ("dp",), (0, 6)))),
        Placement((Shard(0, ("tp",), (3, 1), blocks=2), Shard(1, ("dp",), (2, 4)))),
        Placement(partial=("tp",)),
        Placement(partial=("dp", "tp")),
        Placement((Shard(1, ("dp",), (1, 1), blocks=3),), partial=("tp",)),
    ],
    ids=str,
)
def test_a_placement_may_name_several_axes(accelerator: OfSize, lies: Placement) -> None:
    x = torch.randn(8, 6)
    assert torch.equal(accelerator(4).read(put(accelerator(4), x, lies, GRID)), x)


def test_a_part_is_that_of_the_devices_coordinate(accelerator: OfSize) -> None:
    a, x = accelerator(4), torch.arange(12.0).reshape(2, 6)
    lies = split(1, (1, 2), "tp", blocks=2)  # device 0 has columns 0 and 3, device 1 has 1, 2, 4 and 5; so have 2 and 3
    width = PerRank(("tp",), (2, 4))
    mine = op("aten.select.int", Ref(0), 0, PerRank(("dp",), (0, 1)), outs=1, shapes=((width,),))
    of_all = split(0, (2, 4, 2, 4), "dp", "tp")
    p = program(GRID, [slot(0, f32(2, 6), lies)], [slot(1, f32(12), of_all)], mine)
    (y,) = a.run(p, [put(a, x, lies, GRID)], [])
    assert a.read(y).tolist() == [0, 3, 1, 2, 4, 5, 6, 9, 7, 8, 10, 11]


def test_large_and_strided_tensors_travel(accelerator: OfSize) -> None:
    x = torch.randn(1500, 4000)[:, ::2].t()
    for placement in (REPLICATE, split(0, (1999, 1)), split(1, (700, 800))):
        assert torch.equal(accelerator(2).read(put(accelerator(2), x, placement)), x)


def test_a_tensor_may_change_after_its_upload(accelerator: OfSize) -> None:
    a = accelerator(2)
    for n in (4, 1 << 20):
        x = torch.zeros(n)
        buffer = put(a, x)
        x.fill_(1)
        assert a.read(buffer).sum() == 0


def test_strided_tensors_are_sent_with_small_copies_only() -> None:
    x = torch.arange(24_000).reshape(2, 30, 400).transpose(0, 2)
    views = [bytes(piece) for piece in pieces(x, limit=1000)]
    assert max(map(len, views)) <= 1000
    assert b"".join(views) == bytes(next(pieces(x.contiguous(), limit=1 << 20)))


def test_a_split_that_does_not_fit_is_refused(accelerator: OfSize) -> None:
    with pytest.raises(ValueError, match=r"shape \[4\] cannot be split along dim 0 over dp .* parts of \(2, 3\)"):
        put(accelerator(2), torch.ones(4), split(0, (2, 3)))


# Runs.


@sizes
def test_each_device_computes_on_its_part(accelerator: OfSize, n: int) -> None:
    x, rows = torch.randn(7, 2), split(0, split_evenly(7, n))
    p = program(n, [slot(0, f32(7, 2), rows)], [slot(1, f32(7, 2), rows)], op("aten.exp.default", Ref(0), outs=1))
    a = accelerator(n)
    (y,) = a.run(p, [put(a, x, rows)], [])
    assert torch.equal(a.read(y), x.exp())


@sizes
def test_a_donated_input_is_updated_in_place_and_consumed(accelerator: OfSize, n: int) -> None:
    a, type, rows = accelerator(n), f32(6, 2), split(0, split_evenly(6, n))
    p = increment(n, type, rows)
    first = put(a, torch.zeros(6, 2), rows)
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
    x = put(a, torch.ones(2))
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
    full = op("aten.full.default", (2,), each(1, 10, 100), outs=0, dtype=torch.float32)
    (y,) = a.run(program(3, [], [slot(0, f32(2), TERMS)], full), [], [])
    assert a.read(y).tolist() == [111, 111]


def test_terms_and_parts_are_put_together_when_read(accelerator: OfSize) -> None:
    a = accelerator(4)
    lies = Placement((Shard(0, ("tp",), (1, 2)),), partial=("dp",))
    local = (PerRank(("tp",), (1, 2)),)
    full = op("aten.full.default", local, PerRank(("dp", "tp"), (1, 2, 10, 20)), outs=0, dtype=torch.float32)
    (y,) = a.run(program(GRID, [], [slot(0, f32(3), lies)], full), [], [])
    assert a.read(y).tolist() == [11, 22, 22]


def test_a_loop_over_micro_batches_runs_on_every_device(accelerator: OfSize) -> None:
    """Each device has rows of its own, in passes of uneven length: the sum over all is that of the whole batch."""
    a, on = accelerator(2), mesh(dp=2, micro=3)
    first, last, n = (PerRank(("dp", "micro"), v) for v in ((0, 2, 3, 0, 1, 2), (2, 3, 4, 1, 2, 3), (2, 1, 1, 1, 1, 1)))
    rows = split(0, (4, 3))
    p = program(
        on,
        [slot(0, f32(7, 2), rows)],
        [slot(6, f32(7, 2), rows), slot(7, f32(2))],
        op("repeat"),
        op("aten.slice.Tensor", Ref(0), 0, first, last, outs=1, shapes=((n, 2),)),
        op("aten.sum.dim_IntList", Ref(1), (0,), outs=2),
        op("accumulate", Ref(2), True, outs=3, frees=(2,)),
        op("aten.mul.Scalar", Ref(1), 2, outs=4, frees=(1,)),
        op("collect", Ref(4), outs=5, frees=(4,)),
        op("end_repeat"),
        op("join", Ref(5), 0, outs=6, frees=(5,)),
        op("all_reduce", Ref(3), ("dp",), "sum", outs=7, frees=(3,)),
    )
    x = torch.randn(7, 2)
    for _ in range(2):
        doubled, total = a.run(p, [put(a, x, rows)], [])
        assert torch.equal(a.read(doubled), x * 2)
        assert torch.equal(a.read(total), lockstep.run(p, [x])[1])
        torch.testing.assert_close(a.read(total), x.sum(0))


def test_a_buffer_outlives_the_number_of_micro_batches(accelerator: OfSize) -> None:
    a, rows = accelerator(2), split(0, (2, 2))
    x = put(a, torch.ones(4), rows, mesh(dp=2, micro=4))
    p = program(
        mesh(dp=2, micro=2), [slot(0, f32(4), rows)], [slot(1, f32(4), rows)], op("aten.neg.default", Ref(0), outs=1)
    )
    assert a.read(a.run(p, [x], [])[0]).tolist() == [-1] * 4


def test_a_mesh_of_another_number_of_devices_is_refused(accelerator: OfSize) -> None:
    with pytest.raises(ValueError, match=r"mesh \(dp=2, tp=2\) is of 4 device\(s\), the accelerator has 2"):
        put(accelerator(2), torch.ones(2), on=GRID)


def test_inputs_that_do_not_suit_the_program_are_refused(accelerator: OfSize) -> None:
    a = accelerator(2)
    p = increment(2, f32(4))
    with pytest.raises(
        ValueError, match=r"input 0 .* float32\[4\]@R on .*, but was given Buffer\(float32\[4\]@S0\(dp\)"
    ):
        a.run(p, [put(a, torch.ones(4), split(0, (2, 2)))], [])
    with pytest.raises(ValueError, match=r"= \(2, 1, 0\), but was given \(2, 0, 0\)"):
        a.run(p, [], [])


def test_one_buffer_cannot_be_given_twice_where_it_may_be_overwritten(accelerator: OfSize) -> None:
    a = accelerator(2)
    both = [slot(0, f32(2), donated=True), slot(1, f32(2))]
    p = program(2, both, [slot(0, f32(2), replaces=0)], op("aten.add_.Tensor", Ref(0), Ref(1)))
    x = put(a, torch.ones(2))
    with pytest.raises(ValueError, match="one buffer twice"):
        a.run(p, [x, x], [])


def test_buffers_of_another_accelerator_are_refused(accelerator: OfSize) -> None:
    x = put(accelerator(1), torch.ones(2))
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
    x, p = put(a, torch.zeros(2)), increment(2, f32(2))
    for _ in range(3):
        (x,) = a.run(p, [x], [])
    assert sent.count("Load") == 1 and sent.count("Run") == 3


def test_another_program_of_the_same_name_is_refused(accelerator: OfSize) -> None:
    a, x = accelerator(2), put(accelerator(2), torch.zeros(2))
    p = increment(2, f32(2))
    twin = Program(p.name, p.mesh, p.inputs, p.outputs, 0, (), 0, 0)
    (x,) = a.run(p, [x], [])
    with pytest.raises(ValueError, match="another program named"):
        a.run(twin, [x], [])


def test_a_dropped_buffer_is_freed_on_the_devices(accelerator: OfSize) -> None:
    a = accelerator(2)
    x = put(a, torch.ones(64 << 20), split(0, (64 << 20, 0)))
    a.read(put(a, torch.ones(1)))  # comes after it
    with_it = a.memory()
    del x
    gc.collect()
    a.read(put(a, torch.ones(1)))  # sends what is to be freed, and waits
    without = a.memory()
    assert with_it[0][0] - without[0][0] > 250 << 20


def test_resident_bytes_are_those_of_live_buffers_on_the_fullest_device(accelerator: OfSize) -> None:
    a = accelerator(2)
    gc.collect()
    a.synchronize()
    before = a.resident_bytes
    whole = put(a, torch.ones(100))
    rows = put(a, torch.ones(10, 4), split(0, (7, 3)))
    assert a.resident_bytes - before == 100 * 4 + 7 * 4 * 4
    (whole,) = a.run(increment(2, f32(100)), [whole], [])  # in place: nothing more is held
    p = program(2, [slot(0, f32(100))], [slot(1, f32(100))], op("aten.neg.default", Ref(0), outs=1))
    (negative,) = a.run(p, [whole], [])
    assert a.resident_bytes - before == 2 * 100 * 4 + 7 * 4 * 4
    del whole, rows, negative
    gc.collect()
    a.synchronize()
    assert a.resident_bytes == before


def test_resident_bytes_count_the_longest_part_of_every_dim(accelerator: OfSize) -> None:
    a = accelerator(4)
    before = a.resident_bytes
    buffer = put(a, torch.ones(8, 6), OVER_TWO_DIMS, GRID)
    assert a.resident_bytes - before == 5 * 4 * buffer.type.dtype.itemsize


def test_a_run_returns_at_once_but_never_more_than_one_ahead(accelerator: OfSize) -> None:
    a = accelerator(2)
    work = [op("aten.mm.default", Ref(0), Ref(0), outs=1), op("aten.sum.default", Ref(1), outs=2, frees=(1,))]
    p = program(2, [slot(0, f32(2000, 2000))], [slot(2, f32())], *work)
    x = put(a, torch.zeros(2000, 2000))
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
        put(a, torch.ones(1))


def test_an_accelerator_needs_devices() -> None:
    with pytest.raises(ValueError, match="at least one device"):
        Accelerator([])
