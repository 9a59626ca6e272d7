"""Sums over workers on one machine that read each other's memory, which costs half of what sending it does.

In: a tensor in each worker, of one size and dtype. Out: their sum in its place, the same bit for bit in all of them.

Linux alone has this (process_vm_readv), and may forbid it: `meet` tries. Only addresses and signals are sent, by the
group's backend, so that a worker that dies is noticed as ever. The work is done by who waits for a sum, and not in the
background: that would take the same cores.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

# A part that is read and added at a time: it stays in a core's cache in between.
_PIECE_BYTES = 256 << 10
_PR_SET_PTRACER = 0x59616D61


class _Stretch(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def meet(group: dist.ProcessGroup) -> Neighbours | None:
    """The processes of `group`, all of which have to call this; None for all if one cannot read another's memory."""
    _let_siblings_read()
    mark = torch.tensor([secrets.randbits(62)])
    given = _gathered(torch.tensor([os.getpid(), mark.data_ptr(), int(mark)]), group)
    found = Neighbours(group, [pid for pid, _, _ in given])
    try:
        readable = all(found._number(rank, address) == expected for rank, (_, address, expected) in enumerate(given))
    except (OSError, AttributeError):  # it is forbidden, another machine's process, or this is another system
        readable = False
    everywhere = all(ok for (ok,) in _gathered(torch.tensor([int(readable)]), group))
    return found if everywhere else None


class Neighbours:
    """See the module docstring. `pids` are the processes of `group`, by rank."""

    def __init__(self, group: dist.ProcessGroup, pids: Sequence[int]) -> None:
        self._group = group
        self._pids = pids
        self._rank = group.rank()
        self._others = [r for r in range(len(pids)) if r != self._rank]
        self._begun: list[torch.Tensor] = []
        self._piece = torch.empty(_PIECE_BYTES, dtype=torch.uint8)

    def sum_start(self, x: torch.Tensor) -> Callable[[], None]:
        """The flat `x` is there. The function returned waits until it is the sum; until then it must not be touched.
        RuntimeError or OSError if one of the others is gone."""
        self._begun.append(x)
        return self._sum_all

    def _sum_all(self) -> None:
        """All sums that have been begun: they are the same ones everywhere. Each process adds up a stretch of every
        tensor, and then reads the others' stretches."""
        xs, self._begun = self._begun, []
        if not xs:
            return
        addresses = _gathered(torch.tensor([x.data_ptr() for x in xs]), self._group)
        for i, x in enumerate(xs):
            self._add_up(x, self._stretch(x, self._rank), [of_rank[i] for of_rank in addresses])
        self._await_all()
        for i, x in enumerate(xs):
            for rank in self._others:
                stretch = self._stretch(x, rank)
                self._read(rank, addresses[rank][i] + stretch.start * x.itemsize, x[stretch])
        self._await_all()  # until then they read here

    def _stretch(self, x: torch.Tensor, rank: int) -> slice:
        size = len(self._pids)
        return slice(rank * len(x) // size, (rank + 1) * len(x) // size)

    def _add_up(self, x: torch.Tensor, stretch: slice, addresses: Sequence[int]) -> None:
        piece = self._piece.view(x.dtype)
        for at in range(stretch.start, stretch.stop, len(piece)):
            sums = x[at : min(at + len(piece), stretch.stop)]
            for rank in self._others:
                term = piece[: len(sums)]
                self._read(rank, addresses[rank] + at * x.itemsize, term)
                sums += term

    def _await_all(self) -> None:
        dist.all_reduce(torch.zeros(1), group=self._group)

    def _number(self, rank: int, address: int) -> int:
        into = torch.zeros(1, dtype=torch.int64)
        self._read(rank, address, into)
        return int(into)

    def _read(self, rank: int, address: int, into: torch.Tensor) -> None:
        """Fills the contiguous `into` with the memory at `address` of another process."""
        done = 0
        while done < into.nbytes:
            here = _Stretch(into.data_ptr() + done, into.nbytes - done)
            there = _Stretch(address + done, into.nbytes - done)
            count = _libc.process_vm_readv(
                self._pids[rank], ctypes.byref(here), ctypes.c_ulong(1), ctypes.byref(there), ctypes.c_ulong(1), 0
            )
            if count <= 0:
                code = ctypes.get_errno()
                raise OSError(code, f"the memory of device {rank} cannot be read: {os.strerror(code)}")
            done += count


_libc = ctypes.CDLL(None, use_errno=True)
if hasattr(_libc, "process_vm_readv"):
    _libc.process_vm_readv.restype = ctypes.c_ssize_t


def _let_siblings_read() -> None:
    """Where the system lets only ancestors read a process (Yama), the children of this one's parent may, too."""
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(os.getppid()), *[ctypes.c_ulong(0)] * 3)


def _gathered(own: torch.Tensor, group: dist.ProcessGroup) -> list[list[int]]:
    """`own` of each, by rank."""
    found = own.new_empty((group.size(), len(own)))
    dist.all_gather_single(found.view(-1), own, group=group)
    rows: list[list[int]] = found.tolist()
    return rows
