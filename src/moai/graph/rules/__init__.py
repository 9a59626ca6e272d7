"""Sharding rules: for each operator, what every dim of its tensors runs over (`dims.Dims`), and whether it is linear.

In: an operator with its arguments and global types (`dims.Call`). Out: `Dims`, or None where nothing may be split.
Rules say what is possible; `lower` decides.
"""

from __future__ import annotations

import torch

import moai.graph.ops
import moai.graph.part_ops  # noqa: F401  (they register torch.ops.moai, which the tables name)
from moai.graph.rules import factories, indexing, matmul, nn, pointwise, reductions, views
from moai.graph.rules.dims import Rule

RULES: dict[torch._ops.OpOverload, Rule] = {
    **pointwise.RULES,
    **views.RULES,
    **reductions.RULES,
    **matmul.RULES,
    **indexing.RULES,
    **nn.RULES,
    **factories.RULES,
}


def rule_of(op: torch._ops.OpOverload) -> Rule | None:
    """The rule of `op`, or None where there is none: it has to be given whole tensors."""
    found = RULES.get(op)
    if found is None and torch.Tag.pointwise in op.tags:
        return pointwise.pointwise
    return found
