"""One instruction of a device, on tensors without data.

In: an instruction that is no builtin, and its arguments as meta tensors. Out: its results as meta tensors, which share
memory as the real ones do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch

from moai.graph.meta_kernels import meta_kernel
from moai.graph.step_graph import Scalar, refs
from moai.lower.operators import operator
from moai.lower.program import Instruction

_META = torch.device("meta")
# They write in place, and PyTorch has no kernels of theirs for meta tensors.
_ONLY_WRITE = frozenset({"aten._fused_sgd_.default", "aten._fused_adagrad_.default"})


def run(op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The results of operator `op`. NotImplementedError where PyTorch cannot tell without data what they are."""
    if op in _ONLY_WRITE:
        return None
    names = _names(op)
    if "device" in names:
        at = names.index("device")
        if at < len(args):
            args = (*args[:at], _META, *args[at + 1 :])
        else:
            kwargs = {**kwargs, "device": _META}
    return meta_kernel(operator(op))(*args, **kwargs)


def sample(instruction: Instruction, scalar: Scalar) -> float | int:
    """A number that may stand for `scalar` among the arguments."""
    kinds = {a.name: str(a.type) for a in operator(instruction.op)._schema.arguments}
    name = next((name for name, arg in named_arguments(instruction) if arg == scalar), "")
    return 1 if kinds.get(name) == "int" else 1.0


def named_arguments(instruction: Instruction) -> Iterator[tuple[str, Any]]:
    """The operator's names for the arguments, with these."""
    yield from zip(_names(instruction.op), instruction.args, strict=False)
    yield from instruction.kwargs.items()


def written(instruction: Instruction) -> list[int]:
    """The values that the operator overwrites, one entry for each time that it does."""
    mutated = _mutated(instruction.op)
    if not mutated:
        return []
    found = [r.id for name, arg in named_arguments(instruction) if name in mutated for r in refs(arg)]
    if instruction.op.startswith("aten._fused_") and instruction.kwargs.get("grad_scale") is None:
        # Fused optimizers change gradients only to unscale them.
        grads = {r.id for name, arg in named_arguments(instruction) if name == "grads" for r in refs(arg)}
        found = [i for i in found if i not in grads]
    return found


def only_written(instruction: Instruction) -> set[int]:
    """Of the values that it overwrites, those whose old content does not matter."""
    if instruction.op == "aten.copy_.default" or instruction.op.endswith(".out"):
        mutated = _mutated(instruction.op)
        read = {r.id for name, arg in named_arguments(instruction) if name not in mutated for r in refs(arg)}
        return set(written(instruction)) - read
    return set()


@cache
def _names(op: str) -> tuple[str, ...]:
    return tuple(a.name for a in operator(op)._schema.arguments)


@cache
def _mutated(op: str) -> frozenset[str]:
    arguments = operator(op)._schema.arguments
    return frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
