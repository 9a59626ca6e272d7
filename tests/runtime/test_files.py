"""Devices write what they hold of a tensor into a file, which then has it whole. With real workers."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moai.graph.placement import REPLICATE, Placement, Shard
from moai.runtime import files
from moai.runtime.accelerator import Accelerator
from tests.runtime.programs import TERMS, mesh, put, split

OfSize = Callable[[int], Accelerator]


@pytest.mark.parametrize(
    "lies",
    [
        REPLICATE,
        split(0, (1, 0, 4, 3), "dp", "tp"),
        split(1, (1, 2, 3, 0), "tp", "dp"),
        split(1, (2, 1), "tp", blocks=2),
        Placement((Shard(0, ("dp",), (5, 3)), Shard(1, ("tp",), (1, 2), blocks=2))),
    ],
    ids=str,
)
def test_a_file_gets_the_tensor_however_it_lies(accelerator: OfSize, tmp_path: Path, lies: Placement) -> None:
    x, file = torch.randn(8, 6), tmp_path / "file"
    file.write_bytes(bytes(20 + x.nbytes + 5))
    accelerator(4).write([(put(accelerator(4), x, lies, mesh(dp=2, tp=2)), 20)], str(file))
    found = file.read_bytes()
    assert found[:20] == bytes(20) and found[20 + x.nbytes :] == bytes(5)
    assert torch.equal(torch.frombuffer(bytearray(found[20:-5]), dtype=x.dtype).view(8, 6), x)


def test_each_part_is_written_by_one_device(accelerator: OfSize) -> None:
    a, x = accelerator(4), torch.randn(8, 6)
    whole = list(files.regions(put(a, x, REPLICATE), 1, 0))
    halves = list(files.regions(put(a, x, split(1, (3, 3), "tp"), mesh(dp=2, tp=2)), 1, 0))
    assert len(whole) == 1
    assert [(region.at, region.shape) for _, region in halves] == [(0, (8, 3)), (12, (8, 3))]


def test_a_stage_writes_what_it_has(accelerator: OfSize, tmp_path: Path) -> None:
    a, file, stages = accelerator(2), tmp_path / "file", mesh(pp=2)
    low, high = (a.upload(torch.full((3,), 1.0 + n), Placement(stages=(n,)), stages) for n in (0, 1))
    file.write_bytes(bytes(24))
    a.write([(high, 12), (low, 0)], str(file))
    assert torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32).tolist() == [1, 1, 1, 2, 2, 2]


def test_a_file_that_cannot_be_written_is_an_error_of_the_script_and_the_devices_go_on(
    accelerator: OfSize, tmp_path: Path
) -> None:
    a, x = accelerator(2), torch.arange(4.0)
    buffer = put(a, x, split(0, (1, 3)))
    with pytest.raises(FileNotFoundError, match="nowhere") as failed:
        a.write([(buffer, 0)], str(tmp_path / "nowhere"))
    assert failed.value.errno == errno.ENOENT
    with pytest.raises(OSError, match="No space left"):
        a.write([(buffer, 0)], "/dev/full")
    assert torch.equal(a.read(buffer), x)


def test_a_sum_that_nobody_holds_is_not_written(accelerator: OfSize, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a sum that nobody holds"):
        accelerator(2).write([(put(accelerator(2), torch.ones(2), TERMS), 0)], str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (torch.empty(4, 6), [(0, 24)]),
        (torch.empty(4, 6)[1:3], [(0, 12)]),
        (torch.empty(3, 6)[:, :2], [(0, 2), (6, 2), (12, 2)]),
        (torch.empty(2, 2, 3)[:, :1], [(0, 3), (6, 3)]),
        (torch.empty(()), [(0, 1)]),
    ],
)
def test_what_lies_without_gaps_is_one_run(view: torch.Tensor, expected: list[tuple[int, int]]) -> None:
    assert list(files.runs(view.shape, view.stride())) == expected


def test_long_runs_and_strided_parts_are_written_in_pieces(tmp_path: Path) -> None:
    x = torch.randn(1000, 700)
    with (tmp_path / "file").open("wb") as file:
        sizes = list(files.write(file.fileno(), x.t(), 0, (700, 1000), (1000, 1)))
    assert len(sizes) >= 3
    found = torch.frombuffer(bytearray((tmp_path / "file").read_bytes()), dtype=x.dtype)
    assert torch.equal(found.view(700, 1000), x.t())
