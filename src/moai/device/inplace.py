"""Changing a type of torch's C++ extension without replacing it.

In: an immutable extension type (`torch.device`, `torch.Generator`) and new attributes. Out: the same type object with
those attributes, so that `is`, `isinstance`, pickles and names imported earlier keep meaning the same type.

CPython forbids setting attributes on such a type by a flag bit alone. The bit is cleared while the attributes are set
and restored afterwards. Everything assumed about the interpreter is checked first; nothing is guessed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# PyTypeObject: a PyVarObject of 3 words, then 18 pointer-sized fields (tp_name ... tp_as_buffer), then tp_flags.
_FLAGS_OFFSET = (3 + 18) * ctypes.sizeof(ctypes.c_void_p)
_IMMUTABLE = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE
_SLOT_NEW = 65  # Py_tp_new, a number of CPython's stable ABI

Construct = Callable[[type, tuple[Any, ...], dict[str, Any]], Any]


def constructor(cls: type) -> Construct:
    """The C constructor that `cls` has now, callable as (cls, args, kwargs) after `change` has replaced `__new__`."""
    get_slot = ctypes.pythonapi.PyType_GetSlot
    get_slot.restype, get_slot.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_int]
    signature = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.py_object)
    return signature(get_slot(cls, _SLOT_NEW))


def change(cls: type, attributes: dict[str, Any]) -> None:
    """Sets `attributes` on the immutable type `cls`.

    Raises RuntimeError if the layout of types in this interpreter is not the one known here; `cls` is untouched then.
    """
    with _mutable(cls):
        for name, value in attributes.items():
            setattr(cls, name, value)


@contextmanager
def _mutable(cls: type) -> Iterator[None]:
    for known in (object, int, type, cls):
        if _flags(known).value != known.__flags__:
            raise RuntimeError(
                "MoAI cannot present its device as 'cuda' in this Python interpreter: the layout of type objects is "
                "not that of a standard 64-bit CPython. Use a standard build of CPython 3.10 or newer, or set "
                "MOAI_CUDA=0 to run without the accelerator."
            )
    flags = _flags(cls)
    before = flags.value
    flags.value = before & ~_IMMUTABLE
    try:
        yield
    finally:
        flags.value |= before & _IMMUTABLE


def _flags(cls: type) -> ctypes.c_ulong:
    return ctypes.c_ulong.from_address(id(cls) + _FLAGS_OFFSET)
