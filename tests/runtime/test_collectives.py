"""Collectives over mesh axes: who exchanges what with whom. With real workers, on a mesh of two by two.

Sums are of whole numbers, so that they are exact in any order.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist

from moai.graph.step_graph import Ref, TensorType
from moai.lower.program import Instruction, PerRank
from moai.runtime.accelerator import Accelerator
from moai.runtime.collectives import Group
from tests.runtime.programs import f32, mesh, op, program, put, slot, split

OfSize = Callable[[int], Accelerator]
GRID = mesh(dp=2, tp=2)
ALL = ("dp", "tp")
# For every device: its peers, in the order of their coordinates.
PEERS = {
    ("dp",): ((0, 2), (1, 3), (0, 2), (1, 3)),
    ("tp",): ((0, 1), (0, 1), (2, 3), (2, 3)),
    ("dp", "tp"): ((0, 1, 2, 3),) * 4,
    ("tp", "dp"): ((0, 2, 1, 3),) * 4,
}
over = pytest.mark.parametrize("axes", PEERS, ids=",".join)
CUTS = [  # dim, blocks, sizes for two parts, sizes for four
    (0, 1, (2, 2), (1, 1, 1, 1)),
    (0, 1, (3, 1), (3, 0, 1, 2)),
    (1, 1, (0, 4), (2, 1, 0, 1)),
    (1, 2, (1, 2), (1, 0, 2, 1)),
    (0, 3, (1, 1), (1, 1, 1, 1)),
]
cuts = pytest.mark.parametrize("dim,blocks,of_two,of_four", CUTS)


def run(a: Accelerator, xs: Sequence[torch.Tensor], outs: Sequence[Sequence[torch.Tensor]], *body: Instruction) -> None:
    """Runs `body` with value i as device r's xs[i][r], and compares value 100 + i with outs[i][r] on device r."""
    inputs = [slot(1000 + i, TensorType(tuple(x.shape), x.dtype), split(0, (1,) * 4, *ALL)) for i, x in enumerate(xs)]
    select = [op("aten.select.int", Ref(1000 + i), 0, 0, outs=i) for i in range(len(xs))]
    flat = [op("aten.reshape.default", Ref(100 + i), (-1,), outs=200 + i) for i in range(len(outs))]
    lengths = [[part.numel() for part in parts] for parts in outs]
    outputs = [
        slot(200 + i, TensorType((sum(n),), parts[0].dtype), split(0, n, *ALL))
        for i, (n, parts) in enumerate(zip(lengths, outs, strict=True))
    ]
    shapes = [
        op(
            "aten.view.default",
            Ref(100 + i),
            tuple(PerRank(ALL, n) for n in zip(*(p.shape for p in parts), strict=True)),
            outs=300 + i,
        )
        for i, parts in enumerate(outs)
    ]
    p = program(GRID, inputs, outputs, *select, *body, *shapes, *flat)
    for _ in range(2):
        found = a.run(p, [put(a, x, s.placement, GRID) for x, s in zip(xs, inputs, strict=True)], [])
        for buffer, expected in zip(found, outs, strict=True):
            assert torch.equal(a.read(buffer), torch.cat([part.flatten() for part in expected]))


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One tensor of small whole numbers for each device."""
    return torch.randint(0, 9, (4, *shape)).to(dtype)


def totals(x: torch.Tensor, axes: tuple[str, ...]) -> list[torch.Tensor]:
    return [x[list(peers)].sum(0).to(x.dtype) for peers in PEERS[axes]]


def part(x: torch.Tensor, dim: int, sizes: Sequence[int], blocks: int, index: int) -> torch.Tensor:
    """Part `index` of every run of `dim`, joined."""
    return torch.cat([run.split(tuple(sizes), dim)[index] for run in x.chunk(blocks, dim)], dim)


def sizes_for(axes: tuple[str, ...], of_two: tuple[int, ...], of_four: tuple[int, ...]) -> tuple[int, ...]:
    return of_four if len(axes) == 2 else of_two


@over
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_all_reduce_sums_over_the_peers(accelerator: OfSize, axes: tuple[str, ...], dtype: torch.dtype) -> None:
    x = numbers(2, 3, dtype=dtype)
    run(accelerator(4), [x], [totals(x, axes)], op("all_reduce", Ref(0), axes, "sum", outs=100))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.uint8, torch.int8])
def test_all_reduce_sums_every_dtype_that_it_can(accelerator: OfSize, dtype: torch.dtype) -> None:
    x = numbers(5, dtype=dtype)
    run(accelerator(4), [x], [totals(x, ("dp",))], op("all_reduce", Ref(0), ("dp",), "sum", outs=100))


@over
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_reduce_takes_the_maximum(accelerator: OfSize, axes: tuple[str, ...], dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 2).to(dtype)
    expected = [x[list(peers)].amax(0) for peers in PEERS[axes]]
    run(accelerator(4), [x], [expected], op("all_reduce", Ref(0), axes, "max", outs=100))


def test_tensors_without_order_in_memory_are_summed(accelerator: OfSize) -> None:
    x = numbers(2, 3)
    turned = op("aten.t.default", Ref(0), outs=1), op("all_reduce", Ref(1), ALL, "sum", outs=100)
    run(accelerator(4), [x], [[t.t() for t in totals(x, ALL)]], *turned)


@over
@cuts
def test_all_gather_joins_the_parts(accelerator: OfSize, axes, dim, blocks, of_two, of_four) -> None:
    a, sizes = accelerator(4), sizes_for(axes, of_two, of_four)
    shape = [4, 4]
    shape[dim] = sum(sizes) * blocks
    x = torch.randn(shape)
    lies = split(dim, sizes, *axes, blocks=blocks)
    gather = op("all_gather", Ref(0), axes, dim, sizes, blocks, outs=1, shapes=(tuple(shape),))
    everywhere = split(0, [shape[0]] * 4, *ALL)
    p = program(GRID, [slot(0, f32(*shape), lies)], [slot(1, f32(4 * shape[0], shape[1]), everywhere)], gather)
    for _ in range(2):
        (y,) = a.run(p, [put(a, x, lies, GRID)], [])
        assert torch.equal(a.read(y), torch.cat([x] * 4))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn])
def test_all_gather_takes_every_dtype(accelerator: OfSize, dtype: torch.dtype) -> None:
    a, lies = accelerator(4), split(0, (2, 1), "tp")
    x = torch.randint(0, 2, (3, 2)).to(dtype)
    gather = op("all_gather", Ref(0), ("tp",), 0, (2, 1), 1, outs=1)
    type = TensorType((3, 2), dtype)
    (y,) = a.run(program(GRID, [slot(0, type, lies)], [slot(1, type)], gather), [put(a, x, lies, GRID)], [])
    assert torch.equal(a.read(y).view(torch.uint8), x.view(torch.uint8))


@over
@cuts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reduce_scatter_leaves_each_its_part_of_the_sum(
    accelerator: OfSize, axes, dim, blocks, of_two, of_four, dtype
) -> None:
    sizes = sizes_for(axes, of_two, of_four)
    shape = [4, 4]
    shape[dim] = sum(sizes) * blocks
    x = numbers(*shape, dtype=dtype)
    expected = [part(total, dim, sizes, blocks, PEERS[axes][r].index(r)) for r, total in enumerate(totals(x, axes))]
    run(accelerator(4), [x], [expected], op("reduce_scatter", Ref(0), axes, dim, sizes, blocks, outs=100))


@over
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_started_reduction_keeps_order_and_shapes(accelerator: OfSize, axes, dtype) -> None:
    xs = [numbers(2, 3, dtype=dtype), numbers(dtype=dtype), numbers(3, 0, dtype=dtype), numbers(5, dtype=dtype)]
    start = op("all_reduce_start", tuple(map(Ref, range(4))), axes, outs=50)
    wait = op("wait", Ref(50), outs=(100, 101, 102, 103), frees=(50,))
    run(accelerator(4), xs, [totals(x, axes) for x in xs], start, wait)


@over
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_large_sum_of_tensors_that_lie_apart_leaves_them_alone(accelerator: OfSize, axes, dtype) -> None:
    xs = [numbers(2, 300_001, dtype=dtype), numbers(7, dtype=dtype)]
    start = op("all_reduce_start", (Ref(0), Ref(1)), axes, outs=50)
    wait = op("wait", Ref(50), outs=(100, 101), frees=(50,))
    copies = [op("aten.clone.default", Ref(i), outs=102 + i) for i in (0, 1)]
    expected = [*(totals(x, axes) for x in xs), *(list(x) for x in xs)]
    run(accelerator(4), xs, expected, start, wait, *copies)


def bucket_sum(x: int, bucket: tuple[int, int], handle: int, axes: tuple[str, ...], shape: Sequence[int]):
    """Value `x` and a few ones, put into a bucket and summed there: what begins it, and the wait."""
    n = len(shape)
    begin = (
        op("bucket", (tuple(shape), (3,)), torch.float32, outs=bucket),
        op("aten.copy_.default", Ref(bucket[0]), Ref(x)),
        op("aten.fill_.Scalar", Ref(bucket[1]), n),
        op("all_reduce_start", tuple(map(Ref, bucket)), axes, outs=handle, in_place=True),
    )
    return begin, op("wait", Ref(handle), outs=())


@over
@pytest.mark.parametrize("length", [1, 300_001], ids=["small", "large"])
def test_a_bucket_becomes_the_sum_in_place(accelerator: OfSize, axes, length: int) -> None:
    x, y = numbers(length), numbers(2, length)
    (*first,), wait_first = bucket_sum(0, (100, 102), 50, axes, (length,))
    (*second,), wait_second = bucket_sum(1, (101, 103), 51, axes, (2, length))
    few = [torch.full((3,), float(len(PEERS[axes][0])))] * 4
    expected = [totals(x, axes), totals(y, axes), few, [2 * t for t in few]]
    run(accelerator(4), [x, y], expected, *first, *second, wait_second, wait_first)


@pytest.mark.parametrize("axes", [("dp",), ALL], ids=",".join)
def test_the_sum_in_a_large_bucket_is_the_same_on_all_peers_bit_for_bit(accelerator: OfSize, axes) -> None:
    a, lies = accelerator(4), split(0, (1,) * 4, *ALL)
    x = torch.randn(4, 300_001)
    begin, wait = bucket_sum(0, (100, 101), 50, axes, (1, 300_001))
    p = program(GRID, [slot(0, f32(4, 300_001), lies)], [slot(102, f32(4, 300_001), lies)], *begin, wait,
                op("aten.clone.default", Ref(100), outs=102))  # fmt: skip
    sums = a.read(a.run(p, [put(a, x, lies, GRID)], [])[0])
    for rank, peers in enumerate(PEERS[axes]):
        assert all(torch.equal(sums[rank], sums[peer]) for peer in peers)
        torch.testing.assert_close(sums[rank], x[list(peers)].sum(0))


@over
def test_a_started_gather_takes_several_tensors(accelerator: OfSize, axes) -> None:
    how = [(dim, sizes_for(axes, two, four), blocks) for dim, blocks, two, four in CUTS]
    wholes = [torch.randn([sum(s) * b if d == dim else 3 for d in (0, 1)]) for dim, s, b in how]
    a = accelerator(4)
    inputs = [
        slot(i, f32(*w.shape), split(dim, s, *axes, blocks=b))
        for i, (w, (dim, s, b)) in enumerate(zip(wholes, how, strict=True))
    ]
    n = len(how)
    everywhere = [slot(10 + i, f32(4 * len(w), w.shape[1]), split(0, [len(w)] * 4, *ALL)) for i, w in enumerate(wholes)]
    start = op("all_gather_start", tuple(map(Ref, range(n))), axes, tuple(how), outs=50)
    p = program(GRID, inputs, everywhere, start, op("wait", Ref(50), outs=tuple(range(10, 10 + n)), frees=(50,)))
    for _ in range(2):
        found = a.run(p, [put(a, w, s.placement, GRID) for w, s in zip(wholes, inputs, strict=True)], [])
        for buffer, whole in zip(found, wholes, strict=True):
            assert torch.equal(a.read(buffer), torch.cat([whole] * 4))


@over
def test_a_started_reduce_scatter_takes_several_tensors(accelerator: OfSize, axes) -> None:
    how = [(dim, sizes_for(axes, two, four), blocks) for dim, blocks, two, four in CUTS]
    xs = [numbers(*(sum(s) * b if d == dim else 3 for d in (0, 1))) for dim, s, b in how]
    expected = [
        [part(total, dim, s, b, PEERS[axes][r].index(r)) for r, total in enumerate(totals(x, axes))]
        for x, (dim, s, b) in zip(xs, how, strict=True)
    ]
    n = len(how)
    start = op("reduce_scatter_start", tuple(map(Ref, range(n))), axes, tuple(how), outs=50)
    run(accelerator(4), xs, expected, start, op("wait", Ref(50), outs=tuple(range(100, 100 + n)), frees=(50,)))


def test_collectives_over_different_axes_may_be_under_way_at_once(accelerator: OfSize) -> None:
    x, y = numbers(4, 2), numbers(4, 2)
    run(
        accelerator(4),
        [x, y],
        [
            totals(x, ("dp",)),
            totals(y, ("tp",)),
            [part(t, 0, (2, 2), 1, r // 2) for r, t in enumerate(totals(y, ("dp",)))],
        ],
        op("all_reduce_start", (Ref(0),), ("dp",), outs=50),
        op("all_reduce_start", (Ref(1),), ("tp",), outs=51),
        op("reduce_scatter_start", (Ref(1),), ("dp",), ((0, (2, 2), 1),), outs=52),
        op("wait", Ref(52), outs=(102,), frees=(52,)),
        op("wait", Ref(51), outs=(101,), frees=(51,)),
        op("wait", Ref(50), outs=(100,), frees=(50,)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_started_with_may_be_overwritten(accelerator: OfSize, dtype: torch.dtype) -> None:
    x, how = numbers(4, 2, dtype=dtype), ((0, (2, 2), 1),)
    run(
        accelerator(4),
        [x],
        [
            totals(x, ("tp",)),
            [torch.cat([x[p] for p in PEERS[("tp",)][r]]) for r in range(4)],
            [part(t, 0, (2, 2), 1, r % 2) for r, t in enumerate(totals(x, ("tp",)))],
        ],
        op("aten.clone.default", Ref(0), outs=1),
        op("all_reduce_start", (Ref(1),), ("tp",), outs=50),
        op("all_gather_start", (Ref(1),), ("tp",), ((0, (4, 4), 1),), outs=51),
        op("reduce_scatter_start", (Ref(1),), ("tp",), how, outs=52),
        op("aten.zero_.default", Ref(1), frees=(1,)),
        *(op("wait", Ref(50 + i), outs=(100 + i,), frees=(50 + i,)) for i in range(3)),
    )


@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter"])
def test_halves_are_rounded_once(accelerator: OfSize, name: str) -> None:
    """256 + 1 is 256 in bfloat16, whose step is 2 there; the sum of all is 259, and rounds to 260."""
    x = torch.tensor([256.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16)[:, None].repeat(1, 4)
    how = ("sum",) if name == "all_reduce" else (0, (1, 1, 1, 1), 1)
    length = 4 if name == "all_reduce" else 1
    run(accelerator(4), [x], [[torch.full((length,), 260.0).bfloat16()] * 4], op(name, Ref(0), ALL, *how, outs=100))


@pytest.mark.parametrize("axes", [("dp",), ALL], ids=",".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_sum_is_the_same_on_all_peers_bit_for_bit(accelerator: OfSize, axes, dtype) -> None:
    a, x = accelerator(4), torch.randn(4, 1001).to(dtype)
    lies = split(0, (1,) * 4, *ALL)
    type = TensorType((4, 1001), dtype)
    reduce = op("all_reduce", Ref(0), axes, "sum", outs=1)
    (y,) = a.run(program(GRID, [slot(0, type, lies)], [slot(1, type, lies)], reduce), [put(a, x, lies, GRID)], [])
    sums = a.read(y)
    for rank, peers in enumerate(PEERS[axes]):
        assert torch.equal(sums[rank], sums[peers[0]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_be_summed_is_refused(dtype: torch.dtype) -> None:
    peers = Group(dist.group.WORLD, 0, [0, 1])
    for call in (
        lambda x: peers.all_reduce(x, "sum"),
        lambda x: peers.all_reduce_start((x,)),
        lambda x: peers.reduce_scatter(x, 0, (1, 1), 1),
    ):
        with pytest.raises(TypeError, match=f"{dtype} tensors cannot be summed over devices: convert to one of"):
            call(torch.ones(2).to(dtype))
