"""A transformer's work, from its dims alone: for models of which there is no graph.

In: a Model, how it is laid out over devices (a Layout), and how the framework that runs it goes about it (a Stack).
Out: a Sample, as `lower.work` reads it off a program, for the same cost model.

Matrices are shared as in Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism" (2019); with `sequence_parallel`, and for the bytes that a layer keeps, as in Korthikanti et al., "Reducing
Activation Recomputation in Large Transformer Models" (2022); states as in Rajbhandari et al., "ZeRO" (2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from moai.graph.step_graph import Phase
from moai.plan.dims import NARROW, Layout, Model, Stack
from moai.plan.work import Memory, Sample, Task, Work


def sample(model: Model, layout: Layout, stack: Stack) -> Sample:
    """The work of the model on a device of one stage; the cost model deals its layers to the stages."""
    builder = _Builder(model, layout, stack)
    few = min(2, model.layers)
    less, more = builder.work(few), builder.work(few + 1)
    handed = builder.tokens * model.hidden * 2 / (layout.tp if stack.sequence_parallel else 1)
    return Sample(less, more, few, model.layers - few, handed, builder.table_memory)


class _Block(NamedTuple):
    """A layer, the embedding (`first`), or the head: its tasks, and the parameters that a device has of it."""

    forward: tuple[Task, ...]
    backward: tuple[Task, ...]
    parameters: float
    first: bool = False


class _Piece(NamedTuple):
    """Some of a layer's forward tasks, and their backward. `kept`: bytes that the backward reads, where they are not
    computed again. `part`: what of a layer it is."""

    part: Literal["product", "attention", "between"]
    forward: tuple[Task, ...]
    backward: tuple[Task, ...]
    kept: float


class _Builder:
    """Tasks and bytes of one device."""

    def __init__(self, model: Model, layout: Layout, stack: Stack) -> None:
        self.model, self.layout, self.stack = model, layout, stack
        self.tokens = layout.samples * model.seq / layout.cp
        # Of the tokens, those that a device handles between the matrices.
        self.own = self.tokens / (layout.tp if stack.sequence_parallel else 1)
        self.shards = layout.dp * layout.cp
        # Bytes of an entry of a product's inputs, as it is kept.
        self._entry = 1 if layout.precision in NARROW and stack.keeps_narrow else 2
        self.pieces = list(self._pieces())

    # A layer

    def _pieces(self) -> Iterator[_Piece]:
        model, stack, tp = self.model, self.stack, self.layout.tp
        h, q, kv, f = model.hidden, model.queries, model.kv, model.ffn
        norm, turn = (2, 2) if stack.fused else (6, 8)
        yield self._between(norm * self.own * h, kept=2 * self.own * h)
        yield self._column((q + 2 * kv) / tp, h)
        if model.gated:
            yield self._between(turn * self.tokens * (q + kv) / tp)
        yield self._attention()
        yield self._row(h, q / tp)._replace(kept=0.0)  # what attention keeps already
        yield self._between(3 * self.own * h, kept=2 * self.own * h)
        yield self._between(norm * self.own * h)
        yield self._column((1 + model.gated) * f / tp, h)
        entries = self.tokens * f / tp
        yield self._between((2 + model.gated * (1 if stack.fused else 3)) * entries, 2 * entries * (1 + model.gated))
        yield self._row(h, f / tp)
        yield self._between(3 * self.own * h)

    def _between(self, moved: float, kept: float = 0.0) -> _Piece:
        """Operators that move so many entries forward, and twice as many backward."""
        calls, moved = self.stack.calls_between, moved * self.stack.entry_bytes
        forward = Task("stream", "forward", bytes=moved, launches=calls)
        return _Piece("between", (forward,), (forward._replace(bytes=2 * moved, launches=2 * calls),), kept)

    def _column(self, n: float, k: float) -> _Piece:
        """A matrix whose columns are shared: its inputs are gathered first, and their gradients summed at last."""
        messages, stack = self._shared_tokens(k), self.stack
        early = 2 if stack.tp_overlap == "all" else 1
        late = 1 if stack.tp_overlap == "none" else 2
        product = self._product(self.tokens, n, k) + self._adapter(n, k)
        backward = (self._product(self.tokens, k, n) + 2 * self._adapter(n, k), self._sums(n, k))
        kept = self._entry * (self.own if stack.gathers_again else self.tokens) * k
        if not messages:
            return _Piece("product", product, (*backward[0], *backward[1]), kept)
        gather, scatter = messages
        if not stack.sequence_parallel:
            summed = scatter._replace(kind="all_reduce", until=late)
            return _Piece("product", product, (*backward[0], summed, *backward[1]), kept)
        again = (gather._replace(until=late),) if stack.gathers_again else ()
        return _Piece(
            "product",
            (gather._replace(until=early), *product),
            (*again, *backward[0], scatter._replace(until=late), *backward[1]),
            kept,
        )

    def _row(self, n: float, k: float) -> _Piece:
        """A matrix whose rows are shared: its outputs are summed at last, and their gradients gathered first."""
        messages, stack = self._shared_tokens(n), self.stack
        product = self._product(self.tokens, n, k) + self._adapter(n, k)
        backward = (*self._product(self.tokens, k, n), *2 * self._adapter(n, k), *self._sums(n, k))
        kept = self._entry * self.tokens * k
        if not messages:
            return _Piece("product", product, backward, kept)
        gather, scatter = messages
        if not stack.sequence_parallel:
            return _Piece("product", (*product, scatter._replace(kind="all_reduce")), backward, kept)
        if stack.tp_overlap == "all":  # pieces of the product are summed while the others are computed
            hidden = (*product[:-1], scatter._replace(until=2), product[-1])
            return _Piece("product", hidden, (gather._replace(until=2), *backward), kept)
        return _Piece("product", (*product, scatter), (gather, *backward), kept)

    def _adapter(self, n: float, k: float) -> tuple[Task, ...]:
        """Reads a product's inputs, and adds to its outputs."""
        queries = (self.model.queries + 2 * self.model.kv) / self.layout.tp
        if not self.model.adapters or (self.model.adapters == "queries" and n != queries):
            return ()
        return (Task("stream", "forward", bytes=2 * self.tokens * (k + 3 * n), launches=4),)

    def _shared_tokens(self, width: float) -> tuple[Task, Task] | None:
        if self.layout.tp == 1:
            return None
        message = 2 * self.tokens * width
        return (
            Task("all_gather", "forward", message=message, axis="tp"),
            Task("reduce_scatter", "forward", message=message, axis="tp"),
        )

    def _product(self, m: float, n: float, k: float, precision: str | None = None) -> tuple[Task, ...]:
        precision = precision or self.layout.precision
        moved = 2 * (m * k + k * n + m * n)
        product = Task("matmul", "forward", precision, 2 * m * n * k, moved, m, n, k)
        if not self.stack.casts or precision == self.layout.half != self.layout.precision:
            return (product,)
        return (Task("stream", "forward", bytes=self.stack.casts * m * k), product)

    def _sums(self, n: float, k: float, precision: str | None = None) -> tuple[Task, ...]:
        """The gradient of a matrix, and its addition to that of earlier micro-batches."""
        if self.model.adapters:
            return ()
        product = self._product(k, n, self.tokens, precision)[-1]
        if not self.stack.accumulates:
            return (product,)
        return (product, Task("stream", "forward", bytes=2 * self.stack.gradient_bytes * n * k, launches=0))

    def _attention(self) -> _Piece:
        model, layout = self.model, self.layout
        width = model.queries / layout.tp
        kept = 2 * self.tokens * (2 * width + 2 * model.kv / layout.tp)
        gathers, scatters = self._shared_sequence()
        if self.stack.flash:
            # Half of the scores are masked; the backward has five products for the forward's two (Dao, 2022).
            flops = 2 * self.tokens * model.seq * width * self.stack.attention_excess
            task = Task("attention", "forward", layout.half, flops, 2 * kept)
            backward = (*gathers, task._replace(flops=2.5 * task.flops, launches=2), *scatters)
            return _Piece("attention", (*gathers, task), backward, kept)
        scores = self.tokens * model.seq * model.heads / layout.tp
        length, head = float(model.seq), model.queries / model.heads
        inner = Task("matmul", "forward", layout.half, 2 * scores * head, 2 * scores, length, length, head)
        outer = inner._replace(n=head, k=length)
        softmax = Task("stream", "forward", bytes=10 * scores, launches=self.stack.calls_between)
        backward = (*gathers, outer, inner, softmax, outer, outer, *scatters)
        return _Piece("attention", (*gathers, inner, softmax, outer), backward, kept + 5 * scores)

    def _shared_sequence(self) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
        """The others' keys and values come in while those at hand are used, and their gradients go out."""
        if self.layout.cp == 1:
            return (), ()
        whole = 4 * self.tokens * self.layout.cp * self.model.kv / self.layout.tp
        gather = Task("all_gather", "forward", message=whole, axis="cp", until=2)
        return (gather,), (gather._replace(kind="reduce_scatter"),)

    def _again(self, piece: _Piece, number: int) -> bool:
        """Whether a layer's piece is computed again. Of "operators" each second product is, as in torchtitan."""
        level = self.layout.recompute
        if level == "operators":
            return piece.part == "between" or (piece.part == "product" and number % 2 == 1)
        return level == "full" or (level == "attention" and piece.part == "attention" and not self.stack.flash)

    def _layer_forward(self) -> list[Task]:
        return [task for piece in self.pieces for task in piece.forward]

    def _layer_backward(self) -> list[Task]:
        products = [piece for piece in self.pieces if piece.part == "product"]
        again = [p for p in self.pieces if self._again(p, products.index(p) if p in products else 0)]
        tasks = [task._replace(phase="backward", recomputed=True) for piece in again for task in piece.forward]
        return tasks + [t._replace(phase="backward") for piece in reversed(self.pieces) for t in piece.backward]

    # A step

    def work(self, n_layers: int) -> Work:
        layer = _Block(
            tuple(self._layer_forward()), tuple(self._layer_backward()), self.model.layer_parameters / self.layout.tp
        )
        blocks = [self._embedding(), *[layer] * n_layers, self._head()]
        tasks = self._pass(blocks, "forward")
        tasks += self._pass(blocks[::-1], "backward")
        # What is in flight at the end of the backward is waited for there.
        tasks = [t if t.until else t._replace(until=len(tasks) - i) for i, t in enumerate(tasks)]
        tasks += [self._update(block) for block in blocks]
        return Work.of(tasks, self._memory(n_layers), self.layout.samples)

    def _pass(self, blocks: Sequence[_Block], phase: Phase) -> list[Task]:
        """One way through the blocks: each one's weights are gathered while the block before it is computed."""
        parts = [list(block.forward if phase == "forward" else block.backward) for block in blocks]
        gathers = [self._gather(block, phase) for block in blocks]
        tasks: list[Task] = []
        for i, (block, part) in enumerate(zip(blocks, parts, strict=True)):
            first = block.first
            if gathers[i] and (i == 0 or not self.stack.dp_overlap):
                tasks += [t._replace(first=first) for t in gathers[i]]
            if i + 1 < len(blocks) and self.stack.dp_overlap:
                tasks += [t._replace(until=len(part) + 1, first=blocks[i + 1].first) for t in gathers[i + 1]]
            tasks += [task._replace(first=first) for task in part]
            if phase == "backward":
                tasks += [t._replace(first=first) for t in self._reduced(block)]
        return tasks

    def _gather(self, block: _Block, phase: Phase) -> list[Task]:
        level, once = self.layout.sharding, self.stack.gathered_once
        if self.shards == 1 or level == "none" or (level == "states" and self.model.adapters):
            return []
        if phase == "backward" and (level != "full" or once):
            return []
        looped = level != "states" and not once
        return [Task("all_gather", phase, message=2 * block.parameters, looped=looped)]

    def _reduced(self, block: _Block) -> list[Task]:
        """Sums the gradients over the devices that share the batch."""
        if self.shards == 1 or self.model.adapters:
            return []
        kind = "all_reduce" if self.layout.sharding == "none" else "reduce_scatter"
        looped = self.layout.sharding in ("gradients", "full") and not self.stack.gathered_once
        message = self.stack.gradient_bytes * block.parameters
        until = 0 if self.stack.dp_overlap else 1  # 0: until the end of the backward
        return [Task(kind, "backward", message=message, looped=looped, until=until)]

    def _update(self, block: _Block) -> Task:
        """The optimizer reads and writes its states, reads gradients twice (for their norm), and writes weights."""
        stack = self.stack
        sharded = 1 if self.layout.sharding == "none" else self.shards
        moved = 2 * stack.state_bytes + 2 * stack.gradient_bytes + stack.weight_bytes
        trained = 0.0 if self.model.adapters else block.parameters / sharded
        return Task("stream", "optimizer", bytes=moved * trained, looped=False, first=block.first)

    def _embedding(self) -> _Block:
        moved = 4 * self.own * self.model.hidden
        look = Task("stream", "forward", bytes=moved)
        spread = look._replace(phase="backward", bytes=2 * moved)
        return _Block((look,), (spread,), self.model.table_parameters / self.layout.tp, first=True)

    def _head(self) -> _Block:
        model, entries = self.model, self.tokens * self.model.vocab / self.layout.tp
        n, k = model.vocab / self.layout.tp, model.hidden
        product = self._product(self.tokens, n, k, self.layout.half)
        loss = Task("stream", "forward", bytes=self.stack.logit_bytes * entries, launches=self.stack.calls_loss)
        backward = (loss, *self._product(self.tokens, k, n, self.layout.half), *self._sums(n, k, self.layout.half))
        own = model.table_parameters / self.layout.tp if not model.tied or self.layout.pp > 1 else 0.0
        return _Block((*product, loss), tuple(task._replace(phase="backward") for task in backward), own)

    # Memory

    def _memory(self, n_layers: int) -> Memory:
        beside = self._held(self._head().parameters) + self.table_memory
        entries = self.tokens * self.model.vocab / self.layout.tp
        logits = Memory(activations=self.stack.logit_bytes * entries)
        layers = self._held(self.model.layer_parameters / self.layout.tp)
        kept = Memory(activations=self._kept())
        return beside + logits + (layers + kept) * n_layers + Memory(buffers=self._working())

    @property
    def table_memory(self) -> Memory:
        """Of the embedding."""
        return self._held(self.model.table_parameters / self.layout.tp)

    def _held(self, parameters: float) -> Memory:
        """Of parameters, their gradients and their states."""
        stack, level = self.stack, self.layout.sharding
        trained = 0.0 if self.model.adapters else parameters
        full = self.shards if level == "full" else 1
        gradients = self.shards if level in ("gradients", "full") else 1
        states = self.shards if level != "none" else 1
        held = Memory(
            stack.weight_bytes * parameters / full,
            stack.gradient_bytes * trained / gradients,
            stack.state_bytes * trained / states,
        )
        if level == "full" and stack.gathered_once:
            held += Memory(parameters=2 * parameters, gradients=stack.gradient_bytes * trained)
        return held

    def _kept(self) -> float:
        """Bytes that a layer keeps for its backward."""
        model, tp = self.model, self.layout.tp
        if self.layout.recompute == "full":
            return 2 * self.own * model.hidden
        if self.layout.recompute == "operators":  # inputs, queries, values, half of what is fed forward, and outputs
            return 2 * (2 * self.own * model.hidden + self.tokens * (2 * model.queries + model.kv + model.ffn) / tp)
        products = [piece for piece in self.pieces if piece.part == "product"]
        return sum(p.kept for p in self.pieces if not self._again(p, products.index(p) if p in products else 0))

    def _working(self) -> float:
        """Bytes for a layer at a time: what is computed again, gradients of activations, and gathered weights."""
        model, layout, summed = self.model, self.layout, self.stack.gradient_bytes
        again = sum(piece.kept for piece in self.pieces) - self._kept()
        gradients = 2 * self.tokens * model.ffn * (1 + model.gated) / layout.tp
        # What tp has not summed yet, and the gradient of what it gathered.
        partial = 4 * self.tokens * model.hidden if layout.tp > 1 else 0.0
        layer = model.layer_parameters / layout.tp
        gathered = {"full": (4 * (not self.stack.gathered_once) + 2 * summed) * layer}.get(layout.sharding, 0.0)
        return again + gradients + partial + gathered
