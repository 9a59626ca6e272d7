"""How much memory a device holds at most while it runs a Program.

In: a Program, complete but for this. Out: bytes: of inputs, results, what kernels work in and what collectives send;
and what of them are gradients and activations, where it is said which values are.

The device is the first one: nobody has larger parts (`split_evenly`). Of a loop it does two passes. The second, when
sums over passes exist already, stands for all later ones, whose parts are no larger. Where parts of passes take turns,
each is looked at when most is under way beside it (`in_flight`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

from moai.graph.step_graph import Ref, Scalar, TensorType, flat_ids, map_args
from moai.lower import on_meta
from moai.lower.exchanged import Footprint, footprint, received
from moai.lower.in_flight import Loop, Waiting, Way, together
from moai.lower.layouts import Laid, Result, dense, results
from moai.lower.operators import BUILTINS, COLLECTIVES, STARTS
from moai.lower.pieces import Kind, Level, Piece, Pieces
from moai.lower.program import Instruction, PerRank, Program
from moai.lower.values import local_lengths
from moai.lower.workspaces import workspace

_INTEGERS = {int}
# What instructions like some were found to do, and how many of these are remembered.
_effects: dict[Hashable, tuple[Any, int]] = {}
_MOST = 1 << 14
# What is held and is no value: what parts make for later ones, messages received ahead, messages under way.
_OTHERS, _AHEAD, _SENT = -1, -2, -3


def peak_bytes(program: Program, types: Mapping[int, TensorType]) -> int:
    """`types`: those of the program's values."""
    return max(map(max, levels(program, types))).total


def levels(
    program: Program, types: Mapping[int, TensorType], kinds: Mapping[int, Kind] | None = None
) -> list[tuple[Level, ...]]:
    """The most that is held during each instruction, in each of its passes, and behind the last one. `kinds`: of
    values, and of messages whose memory will be their results'; those that it does not have are others."""
    ledger = _Ledger(program, types, kinds or {})
    found: list[tuple[Level, ...]] = []
    for index, instruction in enumerate(program.instructions):
        if instruction.op == "repeat":
            ledger.begin(index)
        elif instruction.op == "end_repeat":
            # Until here, the loop's instructions have been looked at in their first pass alone, with nothing beside it.
            ledger.restart()
            for step in (0, 1) if ledger.loop.ways else (1,):
                for part, own in enumerate(ledger.loop.parts):
                    ledger.enter(part, step)
                    for at in own:
                        ledger.add(at)
                        found[at] = (*found[at], ledger.level())
            ledger.leave()
            ledger.free(instruction)
        elif instruction.op != "begin_part":
            ledger.add(index)
        found.append((ledger.level(),))
    ledger.end()
    return [*found, (ledger.level(),)]


class _Ledger(Pieces):
    """Who holds which memory. A list, and a collective under way, hold several pieces."""

    def __init__(self, program: Program, types: Mapping[int, TensorType], kinds: Mapping[int, Kind]) -> None:
        super().__init__(kinds)
        self.step = 0
        self._program = program
        self._mesh = program.mesh
        self._types = types
        self._laid: dict[int, Laid] = {}
        self._footprints: dict[int, Footprint] = {}
        self._results: dict[int, list[Laid]] = {}
        self.loop = Loop((), (), {})
        self._entries: dict[int, Piece] = {}  # of the lists that go from part to part
        self._totals: dict[int, dict[int, list[Piece]]] = {}  # of the parts that add them up
        self._outside: dict[int, Piece] = {}  # that are there before the loop, by their ids
        self._lists: dict[int, list[Piece]] = {}  # of earlier loops
        self._sent: list[int] = []
        self._index = 0
        self._pass = 0  # that messages are looked at in
        self._waiting = Waiting(program, self._received)
        for slot in program.inputs:
            self._fresh(slot.id, dense(self._lengths(local_lengths(slot.type.shape, slot.placement)), slot.type.dtype))

    def _fresh(self, id_: int, laid: Laid) -> None:
        self._laid[id_] = laid
        self._hold(id_, Piece(laid.nbytes))

    def free(self, instruction: Instruction) -> None:
        """What the instruction frees."""
        self._let_go(instruction.frees)

    def end(self) -> None:
        """Outputs that hold more memory than their own are copied, one after the other."""
        donated = {s.id for s in self._program.inputs if s.donated}
        kept = {id(p) for s in self._program.inputs if not s.donated for p in self._held[s.id]}
        for slot in self._program.outputs:
            (piece,) = self._held[slot.id]
            if slot.id not in donated and (piece.nbytes != self._laid[slot.id].nbytes or id(piece) in kept):
                self._fresh(slot.id, self._laid[slot.id])
            kept.add(id(piece))

    # -- loops

    def begin(self, index: int) -> None:
        """A loop begins."""
        self._messages_gone()
        self.loop = Loop.of(self._program, index)
        self._entries, self._totals = {}, {}
        self._outside = {id(piece): piece for pieces in self._held.values() for piece in pieces}
        taken = {i.args[0].id for own in self.loop.parts for i in self._at(own) if i.op == "take"}
        self._lists = {list_: self._held[list_] for list_ in taken if list_ in self._held}

    def restart(self) -> None:
        """The first pass is looked at once more, if it is not the only one under way."""
        if self.loop.ways:
            for part, own in enumerate(self.loop.parts):
                made = [i.outs for i in self._at(own) if i.op == "accumulate"]
                self._totals[part] = {total: self._held[total] for total in made}
            for list_, pieces in self._lists.items():
                self._hold(list_, *pieces)

    def _have_totals(self, parts: Collection[int]) -> None:
        """Of these parts, and of no others."""
        for part, made in self._totals.items():
            self._let_go(made)
            if part in parts:
                for total, pieces in made.items():
                    self._hold(total, *pieces)

    def _at(self, places: range) -> Sequence[Instruction]:
        return self._program.instructions[places.start : places.stop]

    def enter(self, part: int, step: int) -> None:
        """A part of the first pass (0), or (1) of a later one, when most is held for others."""
        self.step = step
        self._let_go((*self._entries, _OTHERS))
        alike: dict[int, list[int]] = defaultdict(list)  # lists, by the memory of their entries
        for list_, piece in self._entries.items():
            if id(piece) not in self._outside:
                alike[id(piece)].append(list_)
            else:
                self._hold(list_, piece)
        sizes: dict[frozenset[Way], int] = defaultdict(int)
        for lists in alike.values():
            sizes[frozenset(self.loop.ways[list_] for list_ in lists)] += self._entries[lists[0]].nbytes
        totals = {
            each: sum(p.nbytes for pieces in made.values() for p in pieces) for each, made in self._totals.items()
        }
        moment = self.loop.fullest(part, step > 0, sizes, totals, self._waiting.at)
        self._pass, held = moment.step, moment.held
        self._have_totals(moment.begun)
        others = 0
        for lists in alike.values():
            there = together(held, {self.loop.ways[list_] for list_ in lists})
            nbytes = self._entries[lists[0]].nbytes
            own = Piece(nbytes, self._entries[lists[0]].kind)
            others += nbytes * len(there - {self._pass})
            for list_ in lists:
                self._hold(list_, *([own] if self._pass in held[self.loop.ways[list_]] else ()))
        self._hold(_OTHERS, Piece(others, "activations"))
        self._wait_for_messages(self.loop.parts[part].start)

    def leave(self) -> None:
        """The loop is over."""
        self._messages_gone()
        self._let_go((*self._entries, _OTHERS))
        self._have_totals(self._totals)
        self.step = self._pass = 0

    # -- instructions

    def add(self, index: int) -> None:
        """Instruction `index`. Everything but the bounds of loops."""
        instruction = self._program.instructions[index]
        self._index = index
        op = instruction.op
        if op in STARTS:
            self._start(instruction)
        elif op in COLLECTIVES:
            self._exchange(instruction)
        elif op in BUILTINS:
            getattr(self, f"_{op}")(instruction)
        else:
            self._compute(instruction)
        self.free(instruction)

    def _compute(self, instruction: Instruction) -> None:
        given: list[int] = []
        found, working = self._effect(instruction, given)
        for out, result in _pairs(instruction.outs, found):
            if out is None:  # made, and dropped at once
                working += result.nbytes if result.shares is None else 0
                continue
            self._laid[out] = result.laid
            self._hold(out, Piece(result.nbytes) if result.shares is None else self._piece(given[result.shares]))
        self._working(working)

    def _effect(self, instruction: Instruction, given: list[int]) -> tuple[Any, int]:
        """Results, nested as its outs, and the bytes that it works in. `given` gets the values that it is given."""
        key = (instruction.op, self._said(instruction.args, given), self._said(instruction.kwargs, given))
        known = _effects.get(key)
        if known is not None:
            return known
        args, kwargs = self._filled(instruction)
        working = workspace(instruction.op, args)
        if instruction.outs is None:
            return None, working
        try:
            found = results(instruction.op, args, kwargs)
        except Exception:  # PyTorch cannot tell without data: what is claimed has to do
            return self._claimed(instruction.outs, iter(instruction.shapes)), working
        if len(_effects) >= _MOST:
            _effects.clear()
        _effects[key] = found, working
        return found, working

    def _said(self, a: Any, given: list[int]) -> Hashable:
        """All that an argument says about the results. Tells 1 from 1.0 and True."""
        kind = type(a)
        if kind is Ref:
            given.append(a.id)
            return self._laid[a.id]
        if kind is tuple and _INTEGERS.issuperset(map(type, a)):
            return a
        if kind is tuple or kind is list:
            return tuple([self._said(x, given) for x in a])
        if kind is dict:
            return tuple([(name, self._said(x, given)) for name, x in a.items()])
        return (int, self._here(a)) if kind is PerRank else Scalar if kind is Scalar else (kind, a)

    def _claimed(self, outs: Any, shapes: Iterator[Sequence[Any]]) -> Any:
        if isinstance(outs, int):
            laid = dense(self._lengths(next(shapes)), self._types[outs].dtype)
            return Result(laid, None, laid.nbytes)
        return None if outs is None else [self._claimed(o, shapes) for o in outs]

    def _filled(self, instruction: Instruction) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def leaf(x: Any) -> Any:
            if isinstance(x, Ref):
                return self._laid[x.id]
            if isinstance(x, PerRank):
                return self._here(x)
            return on_meta.sample(instruction, x) if isinstance(x, Scalar) else x

        return map_args(instruction.args, leaf), map_args(instruction.kwargs, leaf)

    def _here(self, number: PerRank) -> int:
        return number.values[self._mesh.index(number.axes, self._mesh.coordinates(0, self.step))]

    def _lengths(self, shape: Sequence[Any]) -> tuple[int, ...]:
        return tuple(self._here(n) if isinstance(n, PerRank) else n for n in shape)

    def _piece(self, id_: int) -> Piece:
        (piece,) = self._held[id_]
        return piece

    # -- collectives

    def _start(self, instruction: Instruction) -> None:
        xs, axes, *rest = instruction.args
        handle = instruction.outs
        if instruction.kwargs.get("in_place"):
            self._hold(handle)
            return
        found, laid = self._footprint(instruction.op.removesuffix("_start"), xs, axes, rest[0] if rest else ())
        message = Piece(sum(x.nbytes for x in laid)) if found.early else Piece(0)
        self._footprints[handle], self._results[handle] = found, laid
        self._hold(handle, Piece(found.held, "others"), message)

    def _wait(self, instruction: Instruction) -> None:
        handle = instruction.args[0].id
        if handle not in self._footprints:  # of a sum in place
            return
        found, laid = self._footprints.pop(handle), self._results.pop(handle)
        joined = self._held[handle][1] if found.early else Piece(sum(x.nbytes for x in laid))
        for out, x in zip(flat_ids(instruction.outs), laid, strict=True):
            self._laid[out] = x
            self._hold(out, joined if found.joined else Piece(x.nbytes))
        self._working(found.working)

    def _exchange(self, instruction: Instruction) -> None:
        x, axes, *cut = instruction.args
        found, (laid,) = self._footprint(instruction.op, (x,), axes, (tuple(cut),))
        self._fresh(instruction.outs, laid)
        self._working(found.held + found.working)

    def _footprint(
        self, op: str, xs: Sequence[Ref], axes: tuple[str, ...], cuts: Sequence[Any]
    ) -> tuple[Footprint, list[Laid]]:
        given = [self._laid[x.id] for x in xs]
        cuts = cuts if op != "all_reduce" else ((),) * len(xs)
        found = footprint(op, [x.shape for x in given], given[0].dtype, cuts, self._mesh.count(axes), 0)
        shapes = [tuple(received(op, x.shape, cut, 0)) for x, cut in zip(given, cuts, strict=True)]
        return found, [dense(shape, given[0].dtype) for shape in shapes]

    def _bucket(self, instruction: Instruction) -> None:
        self._joined(instruction.outs, *instruction.args)

    def _joined(self, outs: Sequence[int], shapes: Sequence[Sequence[Any]], dtype: torch.dtype) -> None:
        """Tensors in one piece of memory."""
        laid = [dense(self._lengths(shape), dtype) for shape in shapes]
        memory = Piece(sum(x.nbytes for x in laid))
        for out, x in zip(outs, laid, strict=True):
            self._laid[out] = x
            self._hold(out, memory)

    # -- messages

    def _send(self, instruction: Instruction) -> None:
        """A copy is sent, and held until it has arrived: here, until the next one is sent in its place."""
        held = _SENT - self._index
        self._sent.append(held)
        self._hold(held, Piece(sum(self._laid[x.id].nbytes for x in instruction.args[0])))

    def _receive(self, instruction: Instruction) -> None:
        shapes, dtype = instruction.args[2:]
        self._wait_for_messages(self._index)
        self._joined(instruction.outs, shapes, dtype)

    def _received(self, instruction: Instruction) -> int:
        shapes, dtype = instruction.args[2:]
        return sum(dense(self._lengths(shape), dtype).nbytes for shape in shapes)

    def _wait_for_messages(self, index: int) -> None:
        """Hold what is received ahead at this place."""
        self._let_go((_AHEAD,))
        self._hold(_AHEAD, Piece(self._waiting.at(index, self._pass)))

    def _messages_gone(self) -> None:
        """Time has gone by since messages were sent."""
        self._let_go(self._sent)
        self._sent = []

    # -- what loops hand on

    def _accumulate(self, instruction: Instruction) -> None:
        x, owned = instruction.args
        if self.step:
            return
        if owned:
            self._laid[instruction.outs] = self._laid[x.id]
            self._hold(instruction.outs, self._piece(x.id))
        else:
            self._fresh(instruction.outs, dense(self._laid[x.id].shape, self._laid[x.id].dtype))

    def _collect(self, instruction: Instruction) -> None:
        x, list_ = instruction.args[0].id, instruction.outs
        if not self.step:
            self._laid[list_] = self._laid[x]
            self._hold(list_, self._piece(x))
            if list_ in self.loop.ways:
                self._entries[list_] = self._piece(x)
            return
        own = self._piece(x)
        if list_ in self.loop.ways:
            self._hold(list_, *self._held[list_], own)
            return
        passes_between = Piece(own.nbytes * (self._mesh.steps - 2))
        self._hold(list_, self._held[list_][0], passes_between, own)

    def _take(self, instruction: Instruction) -> None:
        list_ = instruction.args[0].id
        *rest, entry = self._held[list_]
        self._laid[instruction.outs] = self._laid[list_]
        self._hold(instruction.outs, entry)
        self._hold(list_, *rest)

    def _join(self, instruction: Instruction) -> None:
        types, out = self._types, instruction.outs
        self._fresh(out, dense(self._lengths(instruction.shapes[0]), types[out].dtype))


def _pairs(outs: Any, found: Any) -> Iterator[tuple[int | None, Result]]:
    if isinstance(found, Result):
        yield outs, found
    elif found is not None:
        for out, each in zip(outs, found, strict=True):
            yield from _pairs(out, each)
