"""Facts about one aten operator that recording needs, read off its schema once.

In: an OpOverload. Out: an `Operator`; for a mutating operator, its functional twin.
"""

from __future__ import annotations

from functools import cache

import torch

aten = torch.ops.aten

# Operators whose schema does not say what they write. (native_batch_norm updates its running statistics silently; the
# device replaces it by its functional form before it is recorded.)
UNANNOTATED_WRITERS = frozenset(
    {"aten::native_batch_norm", "aten::batch_norm_update_stats", "aten::batch_norm_gather_stats",
     "aten::batch_norm_gather_stats_with_counts"}
)  # fmt: skip


class Operator:
    """`mutated`: positions of the arguments that are written. `returned`: for every return value, the index into
    `mutated` of the argument that it is, or None for a new tensor. `takes_device`: it has a `device` argument.
    `output_mask`: position of the argument that says which of the results are wanted, if there is one."""

    __slots__ = ("mutated", "mutated_names", "name", "op", "output_mask", "returned", "takes_device")

    def __init__(self, op: torch._ops.OpOverload) -> None:
        schema = op._schema
        self.op = op
        self.name = str(op)
        written = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
        self.mutated = tuple(i for i, _ in written)
        self.mutated_names = tuple(a.name for _, a in written)
        position = iter(range(len(written)))
        self.returned = tuple(next(position) if r.alias_info else None for r in schema.returns)
        names = [a.name for a in schema.arguments]
        self.takes_device = "device" in names
        self.output_mask = names.index("output_mask") if "output_mask" in names else None

    def __repr__(self) -> str:
        return self.name

    @property
    def is_out_variant(self) -> bool:
        """The written arguments are pure outputs (`out=`): their old content does not matter."""
        return bool(self.mutated) and all(self.op._schema.arguments[i].kwarg_only for i in self.mutated)


def _signature(op: torch._ops.OpOverload, dropped: frozenset[str] = frozenset()) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in op._schema.arguments if a.name not in dropped]


@cache
def functional_twin(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The overload that computes what `op` writes, without writing. Matched by schema, not by overload name:
    `pow_.Scalar` is `pow.Tensor_Scalar`."""
    namespace, name = op._schema.name.split("::")
    out_arguments = frozenset(
        a.name for a in op._schema.arguments if a.kwarg_only and a.alias_info and a.alias_info.is_write
    )
    packet = getattr(getattr(torch.ops, namespace), name if out_arguments else name.removesuffix("_"), None)
    if packet is None:
        return None
    wanted = _signature(op, out_arguments)
    for overload in packet.overloads():
        twin = getattr(packet, overload)
        writes = any(a.alias_info and a.alias_info.is_write for a in twin._schema.arguments)
        if not writes and _signature(twin) == wanted:
            return twin
    return None
