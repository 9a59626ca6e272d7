"""Plain PyTorch functions as StepGraphs, for tests: traced by make_fx, then made functional."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from moai.graph.step_graph import Input, Node, Origin, Output, Ref, StepGraph, TensorType, flat_ids

aten = torch.ops.aten

_lib = torch.library.Library("moai_tracing", "DEF")
_lib.define("phase(str name) -> Tensor")
_lib.impl("phase", lambda name: torch.zeros(()), "CompositeExplicitAutograd")
torch.fx.node.has_side_effect(torch.ops.moai_tracing.phase.default)


def phase(name: str) -> None:
    """What follows in a traced function belongs to this phase; it begins with "forward"."""
    torch.ops.moai_tracing.phase(name)


def trace(
    fn: Callable[..., Any], state: Sequence[torch.Tensor], batch: Sequence[torch.Tensor], where: str = "train.py:1"
) -> StepGraph:
    """The graph of `fn(*state, *batch)`, which may overwrite `state` in place and returns a tuple of tensors.

    Inputs are `state` and then `batch`; outputs are what `fn` returns and then the overwritten tensors. Nothing may
    be read through a view after it was overwritten.
    """
    traced = make_fx(fn)(*(t.clone() for t in (*state, *batch)))
    return _Converter(traced, len(state), where).graph


class _Converter:
    def __init__(self, traced: torch.fx.GraphModule, n_state: int, where: str):
        self._types: list[TensorType] = []
        self._ids: dict[Any, Any] = {}
        self._inputs: list[int] = []
        self._placeholders: list[torch.fx.Node] = []
        self._outputs: list[Output] = []
        self._nodes: list[Node] = []
        self._replacing: dict[int, int] = {}
        self._returned: dict[torch.fx.Node, torch.fx.Node] = {}  # result of an in-place operator -> what it overwrote
        self._where = where
        self._phase: Any = "forward"
        for node in traced.graph.nodes:
            self._convert(node)
        self._outputs += [Output(v, k) for k, v in sorted(self._replacing.items())]
        inputs = tuple(
            Input(id_, batch=k >= n_state, dies=k >= n_state or k in self._replacing)
            for k, id_ in enumerate(self._inputs)
        )
        self.graph = StepGraph(tuple(self._types), inputs, tuple(self._outputs), tuple(self._nodes), 0)

    def _convert(self, node: torch.fx.Node) -> None:
        if node.op == "placeholder":
            self._ids[node] = self._outs(node.meta["val"])
            self._inputs.append(self._ids[node])
            self._placeholders.append(node)
        elif node.op == "output":
            self._outputs = [Output(self._ids[self._target(a)]) for a in node.args[0] if isinstance(a, torch.fx.Node)]
        elif node.op == "call_function" and node.target is operator.getitem:
            self._ids[node] = self._ids[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            self._call(node)
        else:
            raise ValueError(f"cannot convert {node.format_node()}")

    def _call(self, node: torch.fx.Node) -> None:
        if node.target is torch.ops.moai_tracing.phase.default:
            self._phase = node.args[0]
            return
        written = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        op = _functional(node.target) if written else node.target
        args, kwargs = self._args(node.args), {k: self._args(v) for k, v in node.kwargs.items()}
        bound = dict(zip((a.name for a in op._schema.arguments), node.args, strict=False))
        overwritten = [bound[name] for name in written]
        if not written:
            outs = self._outs(node.meta["val"])
        else:
            outs = tuple(map(self._like, overwritten)) if len(op._schema.returns) > 1 else self._like(overwritten[0])
            for target, new in zip(overwritten, outs if len(written) > 1 else (outs,), strict=True):
                self._overwrite(target, new)
        self._nodes.append(Node(op, args, kwargs, outs, Origin(self._phase, where=self._where)))
        self._ids[node] = outs
        if len(written) == 1 and isinstance(overwritten[0], torch.fx.Node):
            self._returned[node] = self._target(overwritten[0])  # x.mul_(2) is x

    def _target(self, node: torch.fx.Node) -> torch.fx.Node:
        return self._returned.get(node, node)

    def _like(self, target: Any) -> Any:
        """Fresh ids for the new contents of `target`, a node or a list of nodes."""
        if isinstance(target, torch.fx.Node):
            self._types.append(self._types[self._ids[self._target(target)]])
            return len(self._types) - 1
        return tuple(map(self._like, target))

    def _overwrite(self, target: Any, new: Any) -> None:
        if not isinstance(target, torch.fx.Node):
            for t, n in zip(target, new, strict=True):
                self._overwrite(t, n)
            return
        target = self._target(target)
        self._ids[target] = new
        if target.op == "placeholder":
            self._replacing[self._placeholders.index(target)] = new

    def _outs(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            self._types.append(TensorType(tuple(value.shape), value.dtype))
            return len(self._types) - 1
        return None if value is None else tuple(self._outs(v) for v in value)

    def _args(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return Ref(self._ids[self._target(value)])
        return tuple(self._args(v) for v in value) if isinstance(value, (tuple, list)) else value


def _functional(op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """aten.add.Tensor for aten.add_.Tensor."""
    packet = getattr(aten, op._schema.name.removeprefix("aten::")[:-1])
    return getattr(packet, op._overloadname)


def single(
    op: torch._ops.OpOverload, args: Sequence[Any], batch: Sequence[int] = (), where: str = "train.py:1"
) -> StepGraph:
    """The graph of one operator. Tensors in `args` are its inputs; `batch`: which of them are batch inputs."""
    types: list[TensorType] = []

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            types.append(TensorType(tuple(value.shape), value.dtype))
            return Ref(len(types) - 1)
        return tuple(map(leaf, value)) if isinstance(value, (tuple, list)) else value

    def out(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            types.append(TensorType(tuple(value.shape), value.dtype))
            return len(types) - 1
        return None if value is None else tuple(map(out, value))

    refs = leaf(args)
    n = len(types)
    outs = out(op(*args))
    inputs = tuple(Input(i, batch=i in batch, dies=False) for i in range(n))
    outputs = tuple(Output(i) for i in flat_ids(outs))
    return StepGraph(tuple(types), inputs, outputs, (Node(op, refs, {}, outs, Origin("forward", where=where)),), 0)
