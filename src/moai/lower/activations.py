"""Who makes, reads and holds the values of a step: what recomputation has to know.

In: canonical nodes with their types. Out: an `Activations`. Values that share memory (a tensor and its views) are kept
or given up together; they go by the name of the one that the memory was made for, their root.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch

import moai.graph.ops  # noqa: F401  (registers torch.ops.moai)
from moai.graph.step_graph import Input, Node, TensorType, flat_ids, refs
from moai.lower.operators import is_view

aten = torch.ops.aten


class Activations:
    """The attributes go by node index, by value id or by root.

    reads, makes: the values that each node reads and makes. maker: the node that makes a value.
    repeatable: for each node, whether it belongs to the forward and gives the same again whenever it runs.
    steps: the repeatable nodes that make new memory, in order (the others are views).
    root: of each value. alive: roots that are there in the backward whatever is decided: inputs, outputs, what the
    optimizer reads, and weights in another dtype (whether those stay is not recomputation's decision).
    saved: the bytes of the other roots that the backward reads. last_forward, first_backward: where a root is read.
    """

    def __init__(
        self, nodes: Sequence[Node], types: Sequence[TensorType], inputs: Sequence[Input], outputs: Sequence[int]
    ):
        self.nodes, self.types = nodes, types
        self.reads = [tuple(r.id for r in refs((n.args, n.kwargs) if n.kwargs else n.args)) for n in nodes]
        self.makes = [(n.outs,) if isinstance(n.outs, int) else tuple(flat_ids(n.outs)) for n in nodes]
        self.maker = {v: i for i, made in enumerate(self.makes) for v in made}
        self.root = list(range(len(types)))
        self.alive = {i.id for i in inputs}
        self.repeatable: list[bool] = []
        self.steps: list[int] = []
        self.last_forward: dict[int, int] = {}
        self.first_backward: dict[int, int] = {}
        self._find_roots()
        self._find_repeatable()
        self._find_weights(inputs)
        self._find_readers()
        self.alive.update(self.root[v] for v in outputs)
        self.saved = {r: types[r].nbytes for r in self.first_backward if self._is_choice(r)}

    def is_at_hand(self, value: int, kept: set[int]) -> bool:
        """Whether the backward can read `value` as the forward made it, if the roots in `kept` stay."""
        root = self.root[value]
        return root in kept or not (self._is_repeatable_value(root) and self._is_repeatable_value(value))

    def sources(self, step: int) -> Iterator[int]:
        """The roots that a step reads and that somebody has to decide about."""
        return (r for r in map(self.root.__getitem__, self.reads[step]) if self._is_choice(r))

    def blocks(self) -> list[list[int]]:
        """The steps of the forward between one backward and the next, for each of them: a script may go through
        several before the optimizer's step."""
        found: list[list[int]] = [[]]
        steps = set(self.steps)
        for i, node in enumerate(self.nodes):
            if i in steps:
                found[-1].append(i)
            elif node.origin.phase == "backward" and found[-1]:
                found.append([])
        return found if found[-1] else found[:-1]

    def _is_repeatable_value(self, value: int) -> bool:
        maker = self.maker.get(value)
        return maker is not None and self.repeatable[maker]

    def _is_choice(self, root: int) -> bool:
        return root not in self.alive and self._is_repeatable_value(root)

    def _find_roots(self) -> None:
        """As in `lower.memory`, a reshape is taken for a copy where its argument may lie apart."""
        strided: set[int] = set()
        for node, read, made in zip(self.nodes, self.reads, self.makes, strict=True):
            if not read or not _is_view(node.op):
                continue
            if node.op is not aten.reshape.default:
                strided.update(made)
            elif not strided.isdisjoint(read):
                continue
            for v in made:
                self.root[v] = self.root[read[0]]

    def _find_repeatable(self) -> None:
        later: set[int] = set()  # values that do not come from the forward alone
        for i, node in enumerate(self.nodes):
            forward = node.origin.phase == "forward" and later.isdisjoint(self.reads[i])
            if not forward:
                later.update(self.makes[i])
            self.repeatable.append(forward and not _draws_unseeded(node.op))
            if self.repeatable[i] and any(self.root[v] == v for v in self.makes[i]):
                self.steps.append(i)

    def _find_weights(self, inputs: Sequence[Input]) -> None:
        state = {i.id for i in inputs if not i.batch}
        for i in self.steps:
            if self.nodes[i].op is aten._to_copy.default and self.root[self.reads[i][0]] in state:
                state.update(self.makes[i])
                self.alive.update(self.makes[i])

    def _find_readers(self) -> None:
        """What is read later by other nodes than the backward's is there anyhow."""
        for i, node in enumerate(self.nodes):
            roots = map(self.root.__getitem__, self.reads[i])
            if self.repeatable[i] or (node.origin.phase == "forward" and _draws_unseeded(node.op)):
                self.last_forward.update(dict.fromkeys(roots, i))
            elif node.origin.phase == "backward":
                for r in roots:
                    self.first_backward.setdefault(r, i)
            else:
                self.alive.update(roots)


@cache
def _is_view(op: torch._ops.OpOverload) -> bool:
    return is_view(str(op))


@cache
def _draws_unseeded(op: torch._ops.OpOverload) -> bool:
    """Whether another run of `op` gives other numbers. Our own random operators take their seed as an argument."""
    return torch.Tag.nondeterministic_seeded in op.tags
