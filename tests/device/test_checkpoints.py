"""safetensors of accelerator tensors: the library's own file, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from moai import session
from tests.device.inline import accelerator

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32),
    *(torch.uint32, torch.float32, torch.complex64, torch.float64, torch.int64, torch.uint64),
)


@pytest.fixture(scope="module", autouse=True)
def cuda() -> Iterator[None]:
    with accelerator():
        yield


def both(tensors: dict[str, torch.Tensor], folder: Path, **kwargs: object) -> tuple[bytes, bytes]:
    """The file of CPU tensors, and that of the same on the accelerator."""
    save_file(tensors, folder / "plain", **kwargs)
    save_file({name: x.cuda() for name, x in tensors.items()}, folder / "ours", **kwargs)
    return (folder / "plain").read_bytes(), (folder / "ours").read_bytes()


def test_the_file_is_that_of_the_library(tmp_path: Path) -> None:
    tensors = {f"{n}.{dtype}": torch.tensor([[0, 1, 1]]).to(dtype) for n in "ba" for dtype in DTYPES}
    plain, ours = both(
        {**tensors, "scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "ü": torch.ones(2)}, tmp_path
    )
    assert ours == plain


def test_metadata_is_in_it(tmp_path: Path) -> None:
    plain, ours = both({"x": torch.ones(2)}, tmp_path, metadata={"format": 'pt "ü"'})
    assert ours == plain


def test_tensors_of_the_host_may_be_among_them(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, device="cuda"), "b": torch.arange(2.0).requires_grad_()}, tmp_path / "x")
    assert {name: x.tolist() for name, x in load_file(tmp_path / "x").items()} == {"a": [1, 1, 1], "b": [0, 1]}


def test_what_is_computed_is_saved(tmp_path: Path) -> None:
    x = torch.arange(4.0, device="cuda")
    save_file({"x": x * 2, "view": x[1:3], "turned": x.view(2, 2).t().contiguous()}, tmp_path / "x")
    found = load_file(tmp_path / "x")
    assert [found[n].tolist() for n in ("x", "view", "turned")] == [[0, 2, 4, 6], [1, 2], [[0, 2], [1, 3]]]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda x: {"a": x, "b": x}, "share memory"),
        (lambda x: {"a": x.t()}, "`a` is not contiguous"),
        (lambda x: {"a": x, "b": "text"}, "Key `b` is invalid"),
        (lambda x: {"a": x.to(torch.complex128)}, "`a` is of torch.complex128"),
        (lambda x: {"a": x, "b": torch.eye(2).to_sparse()}, "`b` is a sparse tensor"),
    ],
)
def test_what_safetensors_refuses_is_refused(make: object, error: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match=error):
        save_file(make(torch.ones(2, 2, device="cuda")), tmp_path / "x")  # type: ignore[operator]
    assert os.listdir(tmp_path) == []


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "x"
    save_file({"x": torch.ones(2, device="cuda")}, file)
    before = file.read_bytes()
    with (
        mock.patch.object(session.current(), "write", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match="No space left"),
    ):
        save_file({"x": torch.zeros(2, device="cuda")}, file)
    assert (os.listdir(tmp_path), file.read_bytes()) == (["x"], before)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    save_file({"x": torch.ones(2, device="cuda")}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").exists()


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).cuda()
    model[1].weight = model[0].weight
    save_model(model, str(tmp_path / "x"))
    assert sorted(load_file(tmp_path / "x")) == ["0.bias", "0.weight", "1.bias"]
