"""Graphs as bytes, from one process to the next.

In: what a dry run has found. Out: bytes for `pickle.loads`.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch


def packed(result: object) -> bytes:
    """For `pickle.loads`."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(result)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Operators go by name."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch._ops.OpOverload):
            return _operator, (value.namespace, value._schema.name.partition("::")[2], value._overloadname)
        return NotImplemented


def _operator(namespace: str, packet: str, overload: str) -> Any:
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
