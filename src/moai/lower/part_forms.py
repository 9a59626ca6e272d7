"""Operators that look entries up by number, in a form in which that dim can be split (`graph.part_ops`).

In: a node, and a builder of nodes in its stead. Out: whether it was rewritten, and the dim that may be split since.
Losses over classes never see all classes in one place; neither does an embedding see all of its table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moai.graph.rules.dims import Call
from moai.graph.rules.nn import MEAN, SUM
from moai.graph.step_graph import Node
from moai.lower.decompose import Builder
from moai.lower.values import Values

aten = torch.ops.aten
moai = torch.ops.moai


@dataclass(frozen=True, slots=True)
class PartForm:
    """`nodes` stand for `node` if dim `dim` of value `value` is split."""

    node: Node
    nodes: tuple[Node, ...]
    value: int
    dim: int


def part_forms(nodes: Sequence[Node], values: Values) -> Iterator[PartForm]:
    """The form of every node that has one."""
    for node in nodes:
        rewrite = _FORMS.get(node.op)
        if rewrite is not None:
            build = Builder(Call(node, values.types), values)
            found = rewrite(build)
            if found is not None:
                yield PartForm(node, tuple(build.nodes), *found)


def _embedding(build: Builder) -> tuple[int, int] | None:
    call = build.call
    weight, indices = call["weight"], call["indices"]
    build(moai.embedding.default, weight, indices, 0, out=call.node.outs)
    return weight.id, 0


def _embedding_backward(build: Builder) -> tuple[int, int] | None:
    call = build.call
    if call["scale_grad_by_freq"]:
        return None
    args = (call["grad_output"], call["indices"], call["num_weights"], call["padding_idx"], 0)
    build(moai.embedding_backward.default, *args, out=call.node.outs)
    return call.node.outs, 0


def _log_softmax(build: Builder) -> tuple[int, int] | None:
    """The maximum and the sum over all classes are numbers a row: what devices have to tell each other."""
    call = build.call
    source = call.inputs[0]
    dim = call.dims("dim", len(source.shape))[0]
    x = call["self"]
    if call.outputs[0].dtype != source.dtype:
        x = build(aten._to_copy.default, x, dtype=call.outputs[0].dtype)
    shifted = build(aten.sub.Tensor, x, build(aten.amax.default, x, (dim,), True))
    total = build(aten.sum.dim_IntList, build(aten.exp.default, shifted), (dim,), True)
    build(aten.sub.Tensor, shifted, build(aten.log.default, total), out=call.node.outs)
    return call.node.outs, dim


def _log_softmax_backward(build: Builder) -> tuple[int, int] | None:
    call = build.call
    grad, output = call["grad_output"], call["output"]
    dim = call.dims("dim", len(call.inputs[0].shape))[0]
    total = build(aten.sum.dim_IntList, grad, (dim,), True)
    found = build(aten.mul.Tensor, build(aten.exp.default, output), total)
    if call["input_dtype"] == build.type(grad).dtype:
        build(aten.sub.Tensor, grad, found, out=call.node.outs)
    else:
        found = build(aten.sub.Tensor, grad, found)
        build(aten._to_copy.default, found, out=call.node.outs, dtype=call["input_dtype"])
    return call.node.outs, dim


def _class_loss(build: Builder) -> tuple[int, int] | None:
    call = build.call
    scores = call["self"]
    type_ = build.type(scores)
    if len(type_.shape) != 2:
        return None
    target, weight, ignored = call["target"], call["weight"], call["ignore_index"]
    loss, count = call.node.outs
    counted = build(moai.class_weight.default, target, weight, ignored, type_.dtype, out=count)
    if loss is not None and call["reduction"] == MEAN:
        total = build(moai.class_loss.default, scores, target, weight, SUM, ignored, 0)
        build(aten.div.Tensor, total, counted, out=loss)
    elif loss is not None:
        build(moai.class_loss.default, scores, target, weight, call["reduction"], ignored, 0, out=loss)
    return scores.id, 1


def _class_loss_backward(build: Builder) -> tuple[int, int] | None:
    call = build.call
    type_ = build.type(call["self"])
    if len(type_.shape) != 2:
        return None
    grad = call["grad_output"]
    if call["reduction"] == MEAN:
        grad = build(aten.div.Tensor, grad, call["total_weight"])
    args = (grad, call["target"], call["weight"], call["ignore_index"], type_.shape, 0)
    build(moai.class_loss_backward.default, *args, out=call.node.outs)
    return call.node.outs, 1


_FORMS: dict[torch._ops.OpOverload, Callable[[Builder], tuple[int, int] | None]] = {
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.nll_loss_forward.default: _class_loss,
    aten.nll_loss_backward.default: _class_loss_backward,
}
