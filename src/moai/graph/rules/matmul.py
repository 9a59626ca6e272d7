"""Rules of products: the dims of each operand as in an einsum equation; a contracted dim is summed over."""

from __future__ import annotations

import torch

from moai.graph.rules.dims import Call, Dims, Rule

aten = torch.ops.aten


def einsum(equation: str) -> Rule:
    """The rule of an operator that is this einsum."""
    left, right = equation.split("->")
    inputs = tuple(tuple(term) for term in left.split(","))
    dims = Dims(inputs, (tuple(right),), summed=frozenset(left) - frozenset(right) - {","})
    return lambda call: dims


def plus_product(equation: str) -> Rule:
    """bias + product, the bias broadcast to the result. Its contraction is not split: the bias would count more than
    once (`lower` takes the two apart in that case)."""
    left, right = equation.split("->")
    inputs = tuple(tuple(f if f in right else None for f in term) for term in left.split(","))

    def rule(call: Call) -> Dims:
        bias, out = call.inputs[0].shape, call.outputs[0].shape
        lead = len(out) - len(bias)
        matched = tuple(right[lead + d] if s == out[lead + d] else None for d, s in enumerate(bias))
        return Dims((matched, *inputs), (tuple(right),))

    return rule


RULES: dict[torch._ops.OpOverload, Rule] = {
    aten.mm.default: einsum("mk,kn->mn"),
    aten.bmm.default: einsum("bmk,bkn->bmn"),
    aten.mv.default: einsum("mk,k->m"),
    aten.dot.default: einsum("k,k->"),
    aten.vdot.default: einsum("k,k->"),
    aten.addmm.default: plus_product("mk,kn->mn"),
    aten.baddbmm.default: plus_product("bmk,bkn->bmn"),
    aten.addmv.default: plus_product("mk,k->m"),
}
