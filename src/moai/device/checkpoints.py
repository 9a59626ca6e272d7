"""Saving to safetensors without the model in the script's process.

In: `safetensors.torch.save_file`, which everybody who writes this format calls: transformers' `save_pretrained`,
`save_model`, accelerate, peft, diffusers. Out: the same file, byte for byte. Devices write what they hold, and the rest
is fetched a tensor at a time. A file is there whole or, if something fails, as it was before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch

from moai.device import owner
from moai.device.importing import when_imported

# In the order in which safetensors puts them into a file: the last first.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_ALIGNMENT = 8


def install() -> None:
    """Changes safetensors, now or when the script imports it. Call once."""
    when_imported("safetensors.torch", _change)


def _change(module: ModuleType) -> None:
    save_file = module.save_file
    plain = FunctionType(save_file.__code__, save_file.__globals__, "save_file", save_file.__defaults__)

    def save_anywhere(tensors: Any, filename: Any, metadata: dict[str, str] | None) -> None:
        if not (isinstance(tensors, dict) and any(map(_on_accelerator, tensors.values()))):
            plain(tensors, filename, metadata)
            return
        _check(tensors, module._find_shared_tensors)
        _save(tensors, os.path.realpath(os.fspath(filename)), metadata)

    # In place: a script that turns the accelerator on itself has imported libraries that hold this function.
    save_file.__globals__["_moai_save_anywhere"] = save_anywhere
    save_file.__code__ = _save_file.__code__


def _save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
    _moai_save_anywhere(tensors, filename, metadata)  # type: ignore[name-defined]  # noqa: F821


def _on_accelerator(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda"


def _check(tensors: Mapping[Any, Any], find_shared: Callable[[Any], list[set[str]]]) -> None:
    """ValueError or RuntimeError for what safetensors refuses."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"Key `{name}` is invalid, expected str and torch.Tensor but received {type(tensor)}")
        if tensor.layout != torch.strided:
            raise ValueError(f"`{name}` is a sparse tensor, which safetensors does not save: use .to_dense() before.")
        if not tensor.is_contiguous():
            raise ValueError(f"`{name}` is not contiguous, which safetensors does not save: use .contiguous() before.")
        if tensor.dtype not in _NAMES:
            raise ValueError(f"`{name}` is of {tensor.dtype}, which safetensors does not save.")
    if shared := [names for names in find_shared(tensors) if len(names) > 1]:
        raise RuntimeError(
            f"Some tensors share memory: {shared}. They would be in the file twice, and apart when it is loaded. Use "
            "`safetensors.torch.save_model`, or save one of each."
        )


def _save(tensors: Mapping[str, torch.Tensor], path: str, metadata: Mapping[str, str] | None) -> None:
    folder, name = os.path.split(path)
    unfinished = os.path.join(folder, f".{name}.{os.getpid()}.unfinished")
    try:
        begin, places, size = _layout(tensors, metadata)
        with open(unfinished, "wb") as file:
            file.write(begin)
            for tensor, at in places:
                if not _on_accelerator(tensor):
                    file.seek(at)
                    file.write(tensor.detach().resolve_conj().reshape(-1).view(torch.uint8).numpy().data)
            file.truncate(size)
        owner.current().write([(t.detach(), at) for t, at in places if _on_accelerator(t) and t.numel()], unfinished)
        os.replace(unfinished, path)
    except BaseException:
        if os.path.exists(unfinished):
            os.unlink(unfinished)
        raise


def _layout(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[tuple[torch.Tensor, int]], int]:
    """The file's first bytes, where each tensor begins, and the file's size."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offsets = []
    end = 0
    for name, tensor in _in_order(tensors):
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        offsets.append((tensor, end))
        end += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    begin = len(header).to_bytes(8, "little") + header
    return begin, [(tensor, len(begin) + offset) for tensor, offset in offsets], len(begin) + end


def _in_order(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    rank = {dtype: -i for i, dtype in enumerate(_NAMES)}
    yield from sorted(tensors.items(), key=lambda item: (rank[item[1].dtype], item[0].encode()))
