"""Attention in which more devices share the layers than there are key heads.

In: nodes, and the number of devices. Out: nodes in which every query head has a key head of its own, made by each
device for its query heads alone (`moai.repeat_heads`); the gradients are summed back (`moai.sum_heads`). Key and value
projections are then the same on all devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moai.graph.rules.dims import Call
from moai.graph.step_graph import Node, Ref, flat_ids
from moai.lower.decompose import Builder
from moai.lower.values import Values

aten = torch.ops.aten
moai = torch.ops.moai


def own_key_heads(nodes: Sequence[Node], values: Values, tp: int) -> list[Node]:
    makers = {o: n for n in nodes for o in flat_ids(n.outs)}
    found: list[Node] = []
    for node in nodes:
        build = Builder(Call(node, values.types), values)
        if node.op in (moai.sdpa.default, moai.sdpa_backward.default):
            _attention(build, tp)
        elif node.op is aten.reshape.default:
            _repetition(build, makers, tp)
        elif node.op is aten.sum.dim_IntList:
            _sum_of_repetitions(build, makers, tp)
        found += build.nodes or [node]
    return found


def _attention(build: Builder, tp: int) -> None:
    call = build.call
    query, key = call.type_of(call["q"]).shape, call.type_of(call["k"]).shape
    if len(query) != 4 or query[1] == key[1] or key[1] >= tp:
        return
    n, group = query[1], query[1] // key[1]
    k, v = (build(moai.repeat_heads.default, call[name], n, group, 0) for name in ("k", "v"))
    args = build.changed(k=k, v=v, enable_gqa=False)
    if call.op is moai.sdpa.default:
        build(call.op, *args, out=call.node.outs)
        return
    dq, dk, dv = call.node.outs
    of_repeated = [None if o is None else build.new(call.type_of(k)) for o in (dk, dv)]
    build.nodes.append(Node(call.op, args, {}, (dq, *of_repeated), call.node.origin))
    for repeated, out in zip(of_repeated, (dk, dv), strict=True):
        if repeated is not None:
            build(moai.sum_heads.default, Ref(repeated), key[1], group, 0, out=out)


def _repetition(build: Builder, makers: dict[int, Node], tp: int) -> None:
    """[B, kv, 1, T, E] expanded to [B, kv, group, T, E] and reshaped to [B, H, T, E]."""
    call = build.call
    expansion = makers.get(call["self"].id)
    if expansion is None or expansion.op is not aten.expand.default:
        return
    source, wide, out = build.type(expansion.args[0]).shape, call.inputs[0].shape, call.outputs[0].shape
    if len(source) != 5 or source[2] != 1 or len(out) != 4 or source[1] >= tp or not _repeats(wide, out):
        return
    if source != (*wide[:2], 1, *wide[3:]):
        return
    heads = build(aten.reshape.default, expansion.args[0], (*source[:2], *source[3:]))
    build(moai.repeat_heads.default, heads, out[1], wide[2], 0, out=call.node.outs)


def _sum_of_repetitions(build: Builder, makers: dict[int, Node], tp: int) -> None:
    """The backward of that: [B, H, T, E] reshaped to [B, kv, group, T, E] and summed over the group."""
    call = build.call
    spread = makers.get(call["self"].id)
    if spread is None or spread.op is not aten.reshape.default or call.dims("dim", 5) != (2,):
        return
    source, wide = build.type(spread.args[0]).shape, call.inputs[0].shape
    if len(wide) != 5 or len(source) != 4 or wide[1] >= tp or not _repeats(wide, source):
        return
    terms, out = spread.args[0], call.outputs[0]
    if build.type(terms).dtype != out.dtype:  # bf16 is added up in fp32
        terms = build(aten._to_copy.default, terms, dtype=out.dtype)
    summed = build(moai.sum_heads.default, terms, wide[1], wide[2], 0)
    build(aten.reshape.default, summed, out.shape, out=call.node.outs)


def _repeats(wide: Sequence[Any], narrow: Sequence[Any]) -> bool:
    return tuple(narrow) == (wide[0], wide[1] * wide[2], *wide[3:])
