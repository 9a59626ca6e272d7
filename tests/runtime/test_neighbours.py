"""Whether workers may read each other's memory is tried, not assumed. What they do with it is in `test_collectives`."""

import ctypes
import errno
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from moai.runtime import neighbours


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_processes_that_can_read_each_other_are_neighbours(alone: dist.ProcessGroup) -> None:
    assert neighbours.meet(alone) is not None


def test_where_reading_is_forbidden_there_are_none(alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(neighbours._libc, "process_vm_readv", forbidden)
    assert neighbours.meet(alone) is None


def test_a_process_of_that_number_on_another_machine_is_no_neighbour(
    alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours.Neighbours, "_number", lambda *_: 0)  # its memory holds something else
    assert neighbours.meet(alone) is None
