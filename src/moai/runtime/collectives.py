"""The collectives of `lower.program`, on the tensors of one device.

In: local tensors. Out: fresh local tensors; what several devices receive of one sum or part is the same bit for bit.
All peers issue them in the same order. A message is one flat tensor, whatever it holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from moai.graph.placement import Mesh
from moai.runtime.neighbours import Neighbours, meet
from moai.runtime.partners import OfGroup, Outbox, Partner
from moai.runtime.parts import HALVES, cut, total

WAIT = "wait"
# A sum of fewer bytes is sent: signals would take longer than the message.
_WORTH_READING = 1 << 20
_BLOCKING = frozenset({"all_reduce", "all_gather", "reduce_scatter"})
NAMES = _BLOCKING | {f"{name}_start" for name in _BLOCKING} | {WAIT, "send", "receive"}

# A last resort only: the controller notices a stuck collective much earlier, and it knows slow from stuck.
TIMEOUT = timedelta(minutes=30)

_SUMMABLE = HALVES | {
    torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.float64, torch.complex64
}  # fmt: skip
_KINDS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

Tensors = tuple[torch.Tensor, ...]
Shape = Sequence[int]
Cut = tuple[int, Sequence[int], int]  # dim, sizes, blocks: as in Shard


@dataclass(frozen=True, slots=True)
class Started:
    """A collective under way. `finish` makes the results of what has arrived; `sent` must live until then."""

    work: dist.Work | None
    finish: Callable[[], Tensors]
    sent: torch.Tensor | None = None


def wait(started: Started) -> Tensors:
    """The results, in the order of the start's xs."""
    if started.work is not None:
        started.work.wait()
    return started.finish()


class Peers(Protocol):
    """The collectives over some axes. The xs of a start may be freed or overwritten as soon as it returns."""

    def all_reduce(self, x: torch.Tensor, kind: str) -> torch.Tensor: ...

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], blocks: int) -> torch.Tensor: ...

    def reduce_scatter(self, x: torch.Tensor, dim: int, sizes: Sequence[int], blocks: int) -> torch.Tensor: ...

    def all_reduce_start(self, xs: Sequence[torch.Tensor], *, in_place: bool = False) -> Started: ...

    def all_gather_start(self, xs: Sequence[torch.Tensor], cuts: Sequence[Cut]) -> Started: ...

    def reduce_scatter_start(self, xs: Sequence[torch.Tensor], cuts: Sequence[Cut]) -> Started: ...


class Network(Protocol):
    """The other devices of an accelerator."""

    def over(self, mesh: Mesh, axes: Sequence[str]) -> Peers:
        """Those that differ from this device on `axes` alone. All of them must ask for each other in the same order;
        the first time blocks until all have. RuntimeError if one is gone."""

    def at(self, rank: int) -> Partner:
        """Another device, to exchange messages with. Both must ask for each other, and all devices for the lower ranks
        first; the first time may block until the other has."""

    def settle(self) -> None:
        """Waits until all messages that were sent have arrived. RuntimeError if one could not."""


class Distributed:
    """A `Network` over `torch.distributed`: gloo for CPU devices, NCCL for GPUs."""

    def __init__(self, device: torch.device, rank: int, size: int, store: dist.Store) -> None:
        """Meets the `size - 1` other devices at `store`; blocks until all are there."""
        # Not with `device_id`: NCCL would split the communicators of later groups from this one's, in which all devices
        # have to take part, and the two devices of a pair of stages meet alone.
        backend = "gloo" if device.type == "cpu" else "nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        self._rank = rank
        self._cores = _cores()
        assert dist.group.WORLD is not None
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(range(size)): dist.group.WORLD}
        self._neighbours: dict[tuple[int, ...], Neighbours | None] = {}
        self._on_cpu = device.type == "cpu"
        self._device = device
        self._outbox = Outbox()
        self._ways: dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}

    def over(self, mesh: Mesh, axes: Sequence[str]) -> Group:
        ranks = mesh.group(axes, self._rank)
        members = tuple(sorted(ranks))
        if members not in self._groups:
            self._groups[members] = self._new_group(members)
        group = self._groups[members]
        if members not in self._neighbours:
            self._neighbours[members] = meet(group) if self._on_cpu and len(members) > 1 else None
        coordinates = [ranks.index(r) for r in members]
        return Group(group, members.index(self._rank), coordinates, self._neighbours[members])

    def at(self, rank: int) -> Partner:
        if rank not in self._ways:
            self._ways[rank] = self._ways_to(rank)
        going, coming = self._ways[rank]
        return OfGroup(going, coming, rank, self._device, self._outbox)

    def _ways_to(self, rank: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """The groups for messages to and from another device."""
        if self._on_cpu:  # gloo matches messages by sender and receiver
            assert dist.group.WORLD is not None
            return dist.group.WORLD, dist.group.WORLD
        pair = (min(rank, self._rank), max(rank, self._rank))
        up, down = self._new_group(pair), self._new_group(pair)
        return (up, down) if rank > self._rank else (down, up)

    def settle(self) -> None:
        self._outbox.empty()

    def _new_group(self, members: tuple[int, ...]) -> dist.ProcessGroup:
        # Its threads inherit this thread's cores, and are to have those of the first group's: see `Worker.serve`.
        own = _cores()
        _stay_on(self._cores)
        try:
            # Only the members take part, so that it does not matter how many groups a large mesh has.
            return dist.new_group(list(members), timeout=TIMEOUT, use_local_synchronization=True)
        finally:
            _stay_on(own)


class Group:
    """`Peers` over a process group.

    The backend takes the sums, but for those that are scattered, and those of more than two halves: there every device
    receives the terms of its part and adds them up. That rounds once and not at every hop, takes parts of any sizes,
    and is faster than gloo's own reduce-scatter, which is an all-reduce. Large sums are left to `neighbours`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        rank: int,
        coordinates: Sequence[int],
        neighbours: Neighbours | None = None,
    ) -> None:
        """`rank` is this device's in `group`, `coordinates` are those of all its devices, by rank; `neighbours` are
        they, where they can read each other's memory."""
        self._group = group
        self._neighbours = neighbours
        self._rank = rank
        self._coordinates = coordinates
        self._in_order = list(coordinates) == sorted(coordinates)

    def all_reduce(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        return wait(self.all_reduce_start((x,), kind))[0]

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], blocks: int) -> torch.Tensor:
        return wait(self.all_gather_start((x,), ((dim, sizes, blocks),)))[0]

    def reduce_scatter(self, x: torch.Tensor, dim: int, sizes: Sequence[int], blocks: int) -> torch.Tensor:
        return wait(self.reduce_scatter_start((x,), ((dim, sizes, blocks),)))[0]

    def all_reduce_start(self, xs: Sequence[torch.Tensor], kind: str = "sum", *, in_place: bool = False) -> Started:
        _check_dtype(xs[0])
        if in_place:
            return self._reduce_start(memory_of_bucket(xs), kind, tuple)
        if kind == "sum" and xs[0].dtype in HALVES and len(self._coordinates) > 2:
            return self._sum_halves_start(xs)
        shapes = [x.shape for x in xs]
        flat = xs[0].new_empty(_length(shapes))
        _fill(flat, xs, shapes)
        return self._reduce_start(flat, kind, lambda: _views(flat, shapes))

    def all_gather_start(self, xs: Sequence[torch.Tensor], cuts: Sequence[Cut]) -> Started:
        parts = [[_part_shape(x, how, c) for x, how in zip(xs, cuts, strict=True)] for c in self._coordinates]
        # Backends gather messages of one length, so each is as long as the longest one.
        messages = xs[0].new_empty((len(parts), max(map(_length, parts))))
        _fill(messages[self._rank], xs, parts[self._rank])
        whole = [_whole_shape(x, how) for x, how in zip(xs, cuts, strict=True)]

        def finish() -> Tensors:
            if self._in_order and len(whole) == 1 and _consecutive(whole[0], cuts[0]):
                return (messages.view(whole[0]),)
            results = tuple(map(messages.new_empty, whole))
            for message, shapes, c in zip(messages, parts, self._coordinates, strict=True):
                for result, part, how in zip(results, _views(message, shapes), cuts, strict=True):
                    target = cut(result, *how, c)
                    target.copy_(part.view(target.shape))
            return results

        return Started(self._gather_start(messages), finish)

    def reduce_scatter_start(self, xs: Sequence[torch.Tensor], cuts: Sequence[Cut]) -> Started:
        _check_dtype(xs[0])
        parts = [[cut(x, *how, c) for x, how in zip(xs, cuts, strict=True)] for c in self._coordinates]
        lengths = [sum(part.numel() for part in of_device) for of_device in parts]
        terms = xs[0].new_empty(sum(lengths))
        flat_parts = [part for of_device in parts for part in of_device]
        _fill(terms, flat_parts, [part.shape for part in flat_parts])
        own = self._coordinates[self._rank]
        shapes = [_part_shape(x, how, own) for x, how in zip(xs, cuts, strict=True)]
        work, received = self._exchange_start(terms, lengths)
        return Started(work, lambda: _views(total(received.unbind()), shapes), terms)

    def _reduce_start(self, flat: torch.Tensor, kind: str, results: Callable[[], Tensors]) -> Started:
        """Every device's `flat` becomes the sum, or whatever `kind` says; then there are `results`."""
        if kind == "sum" and self._neighbours is not None and flat.nbytes >= _WORTH_READING:
            add_up = self._neighbours.sum_start(flat)

            def finish() -> Tensors:
                add_up()
                return results()

            return Started(None, finish)
        work = dist.all_reduce(flat, _KINDS[kind], self._group, async_op=True) if flat.numel() else None
        return Started(work, results)

    def _sum_halves_start(self, xs: Sequence[torch.Tensor]) -> Started:
        """Every device adds up an equal stretch of the message; the stretches are gathered when they are waited for."""
        shapes = [x.shape for x in xs]
        size = len(self._coordinates)
        stretches = xs[0].new_empty((size, -(-_length(shapes) // size)))
        flat = stretches.view(-1)
        _fill(flat, xs, shapes)
        work, received = self._exchange_start(flat, [stretches.shape[1]] * size)

        def finish() -> Tensors:
            stretches[self._rank] = total(received.unbind())
            gathered = self._gather_start(stretches)
            if gathered is not None:
                gathered.wait()
            return _views(flat, shapes)

        return Started(work, finish)

    def _gather_start(self, messages: torch.Tensor) -> dist.Work | None:
        """Fills `messages`, [devices, length], of which this device's own is filled already."""
        if not messages.numel():
            return None
        # As bytes: gathering does not compute, and backends know fewer dtypes than PyTorch.
        everything, own = messages.view(-1).view(torch.uint8), messages[self._rank].view(torch.uint8)
        return dist.all_gather_single(everything, own, group=self._group, async_op=True)

    def _exchange_start(self, message: torch.Tensor, lengths: Sequence[int]) -> tuple[dist.Work | None, torch.Tensor]:
        """Sends every device its stretch of `message`, of so many `lengths`; what comes in is [devices, own length]."""
        length = lengths[self._rank]
        received = message.new_empty((len(lengths), length))
        if not message.numel():
            return None, received
        work = dist.all_to_all_single(
            received.view(-1), message, [length] * len(lengths), list(lengths), self._group, async_op=True
        )
        return work, received


def bucket(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Tensors:
    """Tensors of `shapes`, one after another in fresh memory."""
    return _views(torch.empty(_length(shapes), dtype=dtype, device=device), shapes)


def memory_of_bucket(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The memory that the tensors of a bucket, in order, make up."""
    length = sum(x.numel() for x in xs)
    assert xs[0].untyped_storage().nbytes() == length * xs[0].itemsize, "these are not all tensors of a bucket"
    return xs[0].as_strided((length,), (1,), 0)


def _check_dtype(x: torch.Tensor) -> None:
    if x.dtype not in _SUMMABLE:
        raise TypeError(f"{x.dtype} tensors cannot be summed over devices: convert to one of {_names(_SUMMABLE)} first")


def _names(dtypes: frozenset[torch.dtype]) -> str:
    return ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))


# Shapes and messages.


def _part_shape(x: torch.Tensor, how: Cut, coordinate: int) -> Shape:
    dim, sizes, blocks = how
    return (*x.shape[:dim], sizes[coordinate] * blocks, *x.shape[dim + 1 :])


def _whole_shape(x: torch.Tensor, how: Cut) -> Shape:
    dim, sizes, blocks = how
    return (*x.shape[:dim], sum(sizes) * blocks, *x.shape[dim + 1 :])


def _consecutive(shape: Shape, how: Cut) -> bool:
    """Whether the parts of a tensor of `shape`, of one length and one after another, are the tensor."""
    dim, sizes, blocks = how
    return len(set(sizes)) == 1 and math.prod(shape[:dim]) * blocks == 1


def _length(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def _views(flat: torch.Tensor, shapes: Sequence[Shape]) -> Tensors:
    """Tensors of `shapes`, one after another from the beginning of `flat`."""
    found, start = [], 0
    for shape in shapes:
        end = start + math.prod(shape)
        found.append(flat[start:end].view(shape))
        start = end
    return tuple(found)


def _fill(flat: torch.Tensor, xs: Sequence[torch.Tensor], shapes: Sequence[Shape]) -> None:
    for view, x in zip(_views(flat, shapes), xs, strict=True):
        assert view.shape == x.shape, (view.shape, x.shape)  # copying would broadcast
        view.copy_(x)


# Cores.


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _stay_on(cores: set[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)
