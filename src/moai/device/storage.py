"""Accelerator tensors: plain torch.Tensors on the PrivateUse1 device, with a unique address and no memory behind it.

In: size, stride, dtype. Out: a tensor whose storage carries a fresh `Record`. The addresses lie in a reserved,
inaccessible range, so host code that follows one faults instead of reading something else.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from functools import cache

import torch

from moai.capture.geometry import span
from moai.capture.values import Record

# DLPack (dlpack.h): device type kDLExtDev, which torch reads as PrivateUse1; (type code, bits) of every dtype.
_EXT_DEVICE = 12
_DTYPES = {
    torch.bool: (6, 8),
    torch.uint8: (1, 8),
    torch.uint16: (1, 16),
    torch.uint32: (1, 32),
    torch.uint64: (1, 64),
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.complex64: (5, 64),
    torch.complex128: (5, 128),
}
_ALIGNMENT = 512
_RANGE_BYTES = 1 << 46
_PROT_NONE, _MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_NORESERVE = 0, 0x02, 0x20, 0x4000

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_from_dlpack = torch._C._from_dlpack


class _AddressRange:
    """Hands out addresses of a reserved range in order, starting over at its end (64 TiB of tensors later)."""

    def __init__(self) -> None:
        mmap = ctypes.CDLL(None, use_errno=True).mmap
        mmap.restype = ctypes.c_void_p
        mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_long]
        size, failed = _RANGE_BYTES, ctypes.c_void_p(-1).value
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
        start = mmap(None, size, _PROT_NONE, flags, -1, 0)
        while start == failed and size > 1 << 30:  # a limit on address space (ulimit -v): take less
            size >>= 1
            start = mmap(None, size, _PROT_NONE, flags, -1, 0)
        if start == failed:
            raise RuntimeError(
                "The accelerator could not reserve 1 GiB of address space for its tensors. Raise the limit "
                "(ulimit -v unlimited)."
            )
        self._start, self._end = start, start + size
        self._next = start

    def take(self, nbytes: int) -> int:
        address = self._next
        self._next = address + nbytes
        if self._next >= self._end:
            address, self._next = self._start, self._start + nbytes
        return address


_addresses: _AddressRange | None = None
_making = threading.Lock()


@cache
def maker(
    size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], tuple[torch.Tensor, Record]]:
    """A function that makes tensors of this geometry, each with its own storage and record.

    One DLPack header a geometry is filled once and kept for good: torch reads it while it builds a tensor, and its
    (absent) deleter when the storage dies.
    """
    global _addresses
    if _addresses is None:
        _addresses = _AddressRange()
    if dtype not in _DTYPES:
        raise RuntimeError(f"The accelerator has no tensors of dtype {dtype}; it has {', '.join(map(str, _DTYPES))}.")
    code, bits = _DTYPES[dtype]
    ndim = len(size)
    header = ctypes.create_string_buffer(64 + 16 * max(1, ndim))
    pointer = ctypes.addressof(header)
    struct.pack_into(
        f"=QiiiBBHQQQQQ{2 * ndim}q",
        header, 0,
        0, _EXT_DEVICE, 0, ndim, code, bits, 1, pointer + 64, pointer + 64 + 8 * ndim, 0, 0, 0,
        *size, *stride,
    )  # fmt: skip
    data = ctypes.c_uint64.from_address(pointer)
    base = (size, stride, dtype)
    nbytes = max(_ALIGNMENT, -(-span(size, stride) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT)
    take = _addresses.take

    def make() -> tuple[torch.Tensor, Record]:
        with _making:  # transformers loads weights in threads: two would share the header, and so an address
            data.value = take(nbytes)
            tensor = _from_dlpack(_new_capsule(pointer, b"dltensor", None))
        record = Record(base)
        tensor.untyped_storage()._moai = record  # type: ignore[attr-defined]
        return tensor, record

    make.header = header  # type: ignore[attr-defined]  # keeps the memory that `pointer` points to
    return make
