"""Recomputation: what the backward reads of the forward is computed again rather than kept.

In: canonical nodes. Out: the same nodes, those of the backward reading from copies of forward nodes, which stand right
before their first use. The copies are the same operators on the same values, so that every bit stays as it was: our
random operators take their seed as an argument; an operator that draws otherwise is not run again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from moai.graph.step_graph import Input, Node, Ref, TensorType, map_args
from moai.lower.activations import Activations
from moai.lower.canonical import needed
from moai.lower.layers import cuts
from moai.plan.plan import Recompute

aten = torch.ops.aten
moai = torch.ops.moai

# Beside operators tagged pointwise or reduction: computing them again costs little more than reading their arguments.
_CHEAP = frozenset(
    {
        aten._fused_rms_norm,
        aten._log_softmax,
        aten._native_batch_norm_legit_functional,
        aten._native_batch_norm_legit_no_training,
        aten._safe_softmax,
        aten._softmax,
        aten._to_copy,
        aten.arange,
        aten.cat,
        aten.clone,
        aten.constant_pad_nd,
        aten.embedding,
        aten.expand,
        aten.full,
        aten.gather,
        aten.index,
        aten.index_select,
        aten.native_group_norm,
        aten.native_layer_norm,
        aten.reshape,
        aten.stack,
        aten.tril,
        aten.triu,
        moai.as_strided,
        moai.random,
    }
)
_RANDOM_WORK = 8  # drawing a number, measured in copies of one
# What is read again after fewer nodes than these is not worth giving up: the same few values, however deep a model is.
# In a graph that is smaller than any model's, it is what is read again after less than this part of its nodes.
_SHORTEST_ABSENCE, _SHORTEST_PART = 10, 0.05


def recomputed(
    nodes: Sequence[Node],
    types: Sequence[TensorType],
    inputs: Sequence[Input],
    outputs: Sequence[int],
    level: Recompute,
    budget: int | None = None,
    staged: bool = False,
) -> tuple[list[Node], list[TensorType]]:
    """The nodes and types with recomputation of `level`. Ids of `types` stay; those of new values come behind them.

    "none": no change. "full": only what the next layers read is kept. "default": what is expensive to compute is kept,
    and as much of the rest as `budget` bytes have room for (None: none of it); what saves the most bytes for the least
    work is given up first. A graph without a backward stays as it is. `staged`: layers may be on stages of their own,
    so that what one gives to the next is kept: else the last one's could be made again from the first one on.

    Outputs, what the optimizer reads, and weights in another dtype are made once, in the forward.
    """
    if level == "none" or all(n.origin.phase != "backward" for n in nodes):
        return list(nodes), list(types)
    activations = Activations(nodes, types, inputs, outputs)
    if level == "full":
        rewrite = _Rewrite(activations, *_layer_inputs(activations))
    else:
        handed_on = _handed_on(activations, _parts(activations)[0]) if staged else set()
        rewrite = _Rewrite(activations, _kept_under(activations, budget) | handed_on, {})
    return needed(rewrite.nodes, outputs), rewrite.types


class _Rewrite:
    """One pass over the nodes. The roots in `kept` stay. `together`: when a value is computed again, those that are
    computed with it, itself included; a value that is not named there comes alone."""

    def __init__(self, activations: Activations, kept: set[int], together: Mapping[int, Iterable[int]]):
        self._activations, self._kept, self._together = activations, kept, together
        self.nodes: list[Node] = []
        self.types = list(activations.types)
        self._copies: dict[int, int] = {}
        for node, read in zip(activations.nodes, activations.reads, strict=True):
            if node.origin.phase == "backward":
                for v in read:
                    self._provide(v)
                node = self._reading_copies(node, read)
            self.nodes.append(node)

    def _provide(self, value: int) -> None:
        if self._is_here(value):
            return
        makers: set[int] = set()
        wanted = list(self._together.get(value, (value,)))
        while wanted:
            v = wanted.pop()
            if self._is_here(v):
                continue
            maker = self._activations.maker[v]
            if maker not in makers:
                makers.add(maker)
                wanted += self._activations.reads[maker]
        for maker in sorted(makers):
            self._copy(maker)

    def _is_here(self, value: int) -> bool:
        return value in self._copies or self._activations.is_at_hand(value, self._kept)

    def _copy(self, maker: int) -> None:
        node = self._reading_copies(self._activations.nodes[maker], self._activations.reads[maker])
        origin = replace(node.origin, phase="backward")
        self.nodes.append(replace(node, outs=_map_ids(node.outs, self._new), origin=origin))

    def _new(self, value: int) -> int:
        self.types.append(self.types[value])
        if not self._activations.is_at_hand(value, self._kept):
            self._copies[value] = len(self.types) - 1
        return len(self.types) - 1

    def _reading_copies(self, node: Node, read: Iterable[int]) -> Node:
        copies = self._copies
        if all(v not in copies for v in read):
            return node

        def renamed(leaf: Any) -> Any:
            return Ref(copies.get(leaf.id, leaf.id)) if isinstance(leaf, Ref) else leaf

        return replace(node, args=map_args(node.args, renamed), kwargs=map_args(node.kwargs, renamed))


def _map_ids(outs: Any, fn: Callable[[int], int]) -> Any:
    if isinstance(outs, int):
        return fn(outs)
    return None if outs is None else tuple(_map_ids(o, fn) for o in outs)


# ---------------------------------------------------------------------- full


def _layer_inputs(activations: Activations) -> tuple[set[int], dict[int, list[int]]]:
    """The roots that stay, and for every value that is to be computed again all those of the same layer.

    What follows the last layer of a block stays (a head and the loss, as a rule): its backward comes at once.
    """
    part, lasting = _parts(activations)
    kept = activations.alive | _handed_on(activations, part)
    kept.update(r for i in activations.steps if part(i) in lasting for r in activations.makes[i])
    together: dict[int, list[int]] = {}
    layers: dict[int, list[int]] = {}
    for node, read in zip(activations.nodes, activations.reads, strict=True):
        if node.origin.phase == "backward":
            for v in read:
                if v not in together and not activations.is_at_hand(v, kept):
                    together[v] = layers.setdefault(part(activations.maker[v]), [])
                    together[v].append(v)
    return kept, together


def _parts(activations: Activations) -> tuple[Callable[[int], int], set[int]]:
    """The layer of each step, by number, and the parts that follow the last layers of blocks."""
    starts: list[int] = []
    lasting: set[int] = set()
    for block in activations.blocks():
        starts += [block[0], *cuts(activations, block)]
        lasting.add(len(starts))
    return lambda at: bisect_right(starts, at), lasting


def _handed_on(activations: Activations, part: Callable[[int], int]) -> set[int]:
    """The roots that a layer makes and a later one reads."""
    last = activations.last_forward
    return {r for i in activations.steps for r in activations.makes[i] if part(last.get(r, i)) > part(i)}


# ---------------------------------------------------------------------- default


@dataclass
class _Group:
    """Roots that are given up together. `extra`: roots to be kept for that, which nobody would keep otherwise."""

    roots: list[int]
    extra: set[int]
    work: int

    def gain(self, types: Sequence[TensorType]) -> int:
        return sum(types[r].nbytes for r in self.roots) - sum(types[r].nbytes for r in self.extra)


def _kept_under(activations: Activations, budget: int | None) -> set[int]:
    """The roots that stay: no more than `budget` bytes of them if giving up cheap ones gets that far."""
    types = activations.types
    groups = [g for g in _groups(activations, _long_absent(activations)) if g.gain(types) > 0]
    groups.sort(key=lambda g: g.work / g.gain(types))
    held = sum(activations.saved.values())
    kept = activations.alive | activations.saved.keys()
    for group in groups:
        if budget is not None and held <= budget:
            break
        held -= group.gain(types)
        kept -= set(group.roots)
        kept |= group.extra
    return kept


def _long_absent(activations: Activations) -> set[int]:
    """The saved roots between whose last use in the forward and first use in the backward much is done."""

    def away(root: int) -> int:
        return activations.first_backward[root] - activations.last_forward.get(root, activations.maker[root])

    nodes = max(activations.first_backward.values(), default=0)
    return {r for r in activations.saved if away(r) > min(_SHORTEST_ABSENCE, _SHORTEST_PART * nodes)}


def _groups(activations: Activations, absent: set[int]) -> list[_Group]:
    """The roots in `absent` that cheap steps make from what is kept."""
    extra = _worth_keeping(activations, absent)
    reached = _reached(activations, extra)
    chains: dict[int, tuple[int, set[int]]] = {}  # of roots that nobody keeps: the work, and what of `extra` they need
    found: dict[int, _Group] = {}
    for i in activations.steps:
        made = activations.makes[i]
        if reached.isdisjoint(made):
            continue
        work, needs = _work(activations, i), set()
        for r in activations.sources(i):
            if r in extra:
                needs.add(r)
            elif r in chains:
                work += chains[r][0]
                needs |= chains[r][1]
                chains[r] = (0, chains[r][1])  # the first to use it pays
        given_up = [r for r in made if r in absent]
        if given_up:
            group = found.setdefault(min(needs, default=given_up[0]), _Group([], set(), 0))
            group.roots += given_up
            group.extra |= needs
            group.work += work
        chains.update((r, (work, needs)) for r in made if r not in activations.saved)
    return list(found.values())


def _reached(activations: Activations, extra: set[int]) -> set[int]:
    """The roots that cheap steps make from what the backward reads and from `extra`."""
    reached = set(extra)
    for i in activations.steps:
        if _is_cheap(activations.nodes[i].op) and not _missing(activations, i, reached):
            reached.update(activations.makes[i])
    return reached - extra


def _worth_keeping(activations: Activations, absent: set[int]) -> set[int]:
    """Roots that the backward does not read, but from which cheap steps make more bytes that it does read."""
    types = activations.types
    reached = _reached(activations, set())
    source: dict[int, int] = {}  # of roots that could be made by a cheap step if one more root were there: that one
    for i in activations.steps:
        missing = _missing(activations, i, reached)
        if len(missing) == 1 and _is_cheap(activations.nodes[i].op):
            source.update(dict.fromkeys(activations.makes[i], *missing))
    saves: defaultdict[int, int] = defaultdict(int)  # bytes that need not be kept if a root is there
    for root in sorted(source, key=activations.maker.__getitem__, reverse=True):
        if root in activations.saved:
            saves[source[root]] += types[root].nbytes if root in absent else 0
        else:
            saves[source[root]] += min(types[root].nbytes, saves[root])
    kept: set[int] = set()
    there: set[int] = set()
    for root in sorted(saves, key=activations.maker.__getitem__):
        if source.get(root) in there:
            there.add(root)
        elif saves[root] > types[root].nbytes:
            kept.add(root)
            there.add(root)
    return kept


def _missing(activations: Activations, step: int, there: set[int]) -> set[int]:
    return {r for r in activations.sources(step) if r not in there and r not in activations.saved}


def _work(activations: Activations, step: int) -> int:
    """Computing a cheap step is moving its entries."""
    node = activations.nodes[step]
    moved = sum(activations.types[v].numel for v in (*activations.reads[step], *activations.makes[step]))
    return moved * (_RANDOM_WORK if node.op.overloadpacket is moai.random else 1)


@cache
def _is_cheap(op: torch._ops.OpOverload) -> bool:
    tagged = torch.Tag.pointwise in op.tags or torch.Tag.reduction in op.tags
    return tagged or op.overloadpacket in _CHEAP
