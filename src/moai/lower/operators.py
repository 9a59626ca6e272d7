"""Facts about the operators that instructions name: which share an argument's memory, which have an in-place form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

import moai.graph.ops
import moai.graph.part_ops  # noqa: F401  (they register torch.ops.moai)
from moai.lower.program import Instruction

aten = torch.ops.aten

# The runtime's own instructions (see `program`).
STARTS = frozenset({"all_reduce_start", "all_gather_start", "reduce_scatter_start"})
COLLECTIVES = STARTS | {"all_reduce", "all_gather", "reduce_scatter"}
BOUNDS = frozenset({"repeat", "begin_part", "end_repeat"})  # of loops, and of the parts of a pass
LOOPS = BOUNDS | {"accumulate", "collect", "take", "join"}
MESSAGES = frozenset({"send", "receive"})
BUILTINS = COLLECTIVES | LOOPS | MESSAGES | {"bucket", "wait", "micro_sum", "micro_join"}

# Their results share memory with the argument although their schemas do not say so.
_SILENT_VIEWS = frozenset(
    {
        str(op)
        for op in (
            aten.reshape.default,
            aten.contiguous.default,
            aten.unsafe_split.Tensor,
            aten.unsafe_split_with_sizes.default,
        )
    }
)

# Arguments through whose memory kernels walk from end to end, whatever their strides are (PyTorch 2.13, on CPU).
WALKED: dict[torch._ops.OpOverload, frozenset[str]] = {
    aten.native_layer_norm_backward.default: frozenset({"mean", "rstd"}),
    aten.native_group_norm.default: frozenset({"input"}),
    aten.native_group_norm_backward.default: frozenset({"grad_out", "input", "mean", "rstd"}),
    aten.nll_loss2d_backward.default: frozenset({"self"}),
}


@cache
def operator(name: str) -> torch._ops.OpOverload:
    """The operator that an instruction names ("aten.mm.default")."""
    space, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, space), packet), overload)


@cache
def is_view(name: str) -> bool:
    """Whether results may share memory with an argument."""
    if name in BUILTINS:
        return False
    if name in _SILENT_VIEWS:
        return True
    op = operator(name)
    # An operator composed of others may return its argument; nobody promised that it does not. (Some have a kernel all
    # the same, like silu_backward, and it is the kernel that runs.)
    composite = _has_kernel(op, "CompositeImplicitAutograd") and not _has_kernel(op, "CPU")
    returned = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
    return returned or composite


def _has_kernel(op: torch._ops.OpOverload, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)


def overlaps_itself(instruction: Instruction) -> bool:
    """Whether one entry of memory stands for several of the result: nothing may be written into it."""
    return instruction.op == "aten.expand.default"


@dataclass(frozen=True, slots=True)
class InPlace:
    """The in-place form of an operator. `mutated`: positions of the arguments it overwrites, in the order in which the
    functional form returns their new contents."""

    op: str
    mutated: tuple[int, ...]


@cache
def in_place_form(name: str) -> InPlace | None:
    """The operator that differs from `name` only in that it writes its results over arguments, if there is one."""
    if name in BUILTINS or is_view(name):
        return None
    op = operator(name)
    space, packet, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, space), packet + "_", None), overload, None)
    if found is None:
        return None
    theirs, ours = found._schema.arguments, op._schema.arguments
    if [a.name for a in theirs] != [a.name for a in ours]:
        return None
    mutated = tuple(i for i, a in enumerate(theirs) if a.alias_info is not None and a.alias_info.is_write)
    if not mutated or len(mutated) != len(op._schema.returns):
        return None
    return InPlace(str(found), mutated)
