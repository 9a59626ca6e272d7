"""Rules of products: the dims of each operand as in an einsum equation; a contracted dim is summed over."""

from __future__ import annotations

import torch

from moai.graph.rules.dims import Call, DimFactors, Dims, Rule, Unit
from moai.graph.step_graph import TensorType

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


def matmul(call: Call) -> Dims:
    lead = tuple(range(len(call.inputs[0].shape) - 2))
    return Dims(((*lead, "m", "k"), (*lead, "k", "n")), ((*lead, "m", "n"),), summed=frozenset("k"))


_KERNEL_WIDTH = 16  # grouped products take rows of as many bytes only, or multiples

# By the ranks of both factors: the groups are rows, columns, parts of what is summed over, or a dim of both.
_GROUPED = {(2, 3): "gk,ekn->gn", (3, 2): "emk,kg->mg", (2, 2): "mg,gn->emn", (3, 3): "emk,ekn->emn"}


def grouped(call: Call) -> Dims | None:
    """Products of groups, of experts as a rule, each with a matrix of its own: split along what is not grouped."""
    if call["bias"] is not None or call["out_dtype"] is not None:
        return None
    left, right = _GROUPED[len(call.inputs[0].shape), len(call.inputs[1].shape)].split("->")
    width = _KERNEL_WIDTH // call.inputs[0].dtype.itemsize

    def dims(term: str, tensor: TensorType) -> DimFactors:
        lengths = zip(term, tensor.shape, strict=True)
        return tuple(Unit(f, width) if f in "mkn" and length % width == 0 else None for f, length in lengths)

    factors = tuple(map(dims, left.split(","), call.inputs))
    groups = ((None,),) * (len(call.inputs) - 2)
    return Dims((*factors, *groups), (dims(right, call.outputs[0]),), summed=frozenset("k"))


def rows(equation: str) -> Rule:
    """Of products of rows by the matrices that each is for, `g` rows: that loop needs no more than its own ones."""
    left, right = equation.split("->")

    def rule(call: Call) -> Dims:
        width = _KERNEL_WIDTH // call.inputs[0].dtype.itemsize

        def dims(term: str, tensor: TensorType) -> DimFactors:
            lengths = zip(term, tensor.shape, strict=True)
            return tuple(
                "g" if f == "g" else Unit(f, width) if f in "mkn" and n % width == 0 else None for f, n in lengths
            )

        factors = tuple(map(dims, left.split(","), call.inputs))
        return Dims(factors, (dims(right, call.outputs[0]),), summed=frozenset(left) - frozenset(right) - {",", "e"})

    return rule


def batched_matrices(call: Call) -> Dims:
    """Inverses and factors of matrices [..., n, n]: the dims before are free, in whatever comes of them."""
    rank = len(call.inputs[0].shape)
    lead = tuple(range(rank - 2))

    def dims(t: TensorType) -> DimFactors:
        return (*lead, *(None,) * (len(t.shape) - len(lead)))

    return Dims(tuple(map(dims, call.inputs)), tuple(map(dims, call.outputs)))


RULES: dict[torch._ops.OpOverload, Rule] = {
    aten.mm.default: einsum("mk,kn->mn"),
    aten.bmm.default: einsum("bmk,bkn->bmn"),
    torch.ops.moai.matmul.default: matmul,
    aten._grouped_mm.default: grouped,
    torch.ops.moai.rows_mm.default: rows("gk,ekn,g->gn"),
    torch.ops.moai.rows_outer.default: rows("gm,gn,g->emn"),
    aten.mv.default: einsum("mk,k->m"),
    aten.dot.default: einsum("k,k->"),
    aten.vdot.default: einsum("k,k->"),
    aten.addmm.default: plus_product("mk,kn->mn"),
    aten.baddbmm.default: plus_product("bmk,bkn->bmn"),
    aten.addmv.default: plus_product("mk,k->m"),
    **dict.fromkeys(
        (
            aten.linalg_inv_ex.default,
            aten.linalg_cholesky_ex.default,
            aten._linalg_svd.default,
            aten._linalg_eigh.default,
            aten.linalg_qr.default,
            aten._linalg_det.default,
            aten._linalg_slogdet.default,
        ),
        batched_matrices,
    ),
}
