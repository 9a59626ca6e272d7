"""What a dry run's process and the one that started it tell each other, as files.

In and out: `Order`s one way, `Captured` or a `Failure` the other.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

from moai.dry.model import ModelStep


@dataclass(frozen=True, slots=True)
class Order:
    """What to run: a script with its arguments, or a `ModelStep`. `memory_bytes`: of the accelerator; `seconds`: the
    longest that it may take."""

    step: ModelStep | tuple[str, ...]
    memory_bytes: int
    seconds: float


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
