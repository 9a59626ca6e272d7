"""How much memory a device holds at most while it runs a Program.

In: a Program, complete but for this. Out: bytes: of inputs, results, what kernels work in and what collectives send;
and what of them are gradients and activations, where it is said which values are.

The device is the first one: nobody has larger parts (`split_evenly`). Of a loop it does two passes. The second, when
sums over passes exist already, stands for all later ones, whose parts are no larger. Where forwards and backwards take
turns, as many micro-batches as are under way at most are so from the first backward on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from moai.graph.step_graph import Ref, Scalar, TensorType, flat_ids, map_args
from moai.lower import on_meta
from moai.lower.exchanged import Footprint, footprint, received
from moai.lower.layouts import Laid, Result, dense, results
from moai.lower.operators import BUILTINS, COLLECTIVES, STARTS
from moai.lower.program import Instruction, PerRank, Program
from moai.lower.values import local_lengths
from moai.lower.workspaces import workspace

_INTEGERS = {int}
# What instructions like some were found to do, and how many of these are remembered.
_effects: dict[Hashable, tuple[Any, int]] = {}
_MOST = 1 << 14

Kind = Literal["gradients", "activations", "others"]


class Level(NamedTuple):
    """Bytes that are held at a moment: in all, and what of them are gradients and activations."""

    total: int
    gradients: int = 0
    activations: int = 0


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
    begin = 0
    for index, instruction in enumerate(program.instructions):
        if instruction.op == "repeat":
            begin = index + 1
            ledger.begin(program.instructions[begin:], *instruction.args)
            found.append((ledger.level(),))
        elif instruction.op == "begin_part":
            ledger.begin_part()
            found.append((ledger.level(),))
        elif instruction.op == "end_repeat":
            # Until here, the loop's instructions have been looked at in their first pass alone.
            ledger.step = 1
            for at in range(begin, index):
                if program.instructions[at].op != "begin_part":
                    ledger.add(program.instructions[at])
                found[at] = (*found[at], ledger.level())
            ledger.step = 0
            ledger.free(instruction)
            found.append((ledger.level(),))
        else:
            ledger.add(instruction)
            found.append((ledger.level(),))
    ledger.end()
    return [*found, (ledger.level(),)]


class _Piece:
    """Memory that is freed at once, when nobody holds it any more."""

    __slots__ = ("holders", "kind", "nbytes")

    def __init__(self, nbytes: int, kind: Kind | None = None) -> None:
        self.nbytes = nbytes
        self.holders = 0
        self.kind = kind  # if none is given, that of who holds it first


class _Ledger:
    """Who holds which memory. A list, and a collective under way, hold several pieces."""

    def __init__(self, program: Program, types: Mapping[int, TensorType], kinds: Mapping[int, Kind]) -> None:
        self.step = 0
        self._level = Level(0)
        self._now = 0
        self._kinds = kinds
        self._of: dict[Kind, int] = {"gradients": 0, "activations": 0, "others": 0}
        self._program = program
        self._mesh = program.mesh
        self._types = types
        self._laid: dict[int, Laid] = {}
        self._held: dict[int, list[_Piece]] = {}
        self._footprints: dict[int, Footprint] = {}
        self._results: dict[int, list[Laid]] = {}
        self._under_way = 0  # micro-batches, at most
        self._in_turns: set[int] = set()  # lists that a later part of the loop reads
        for slot in program.inputs:
            self._fresh(slot.id, dense(self._lengths(local_lengths(slot.type.shape, slot.placement)), slot.type.dtype))

    def level(self) -> Level:
        """The most that was held since this was asked last."""
        found, self._level = self._level, self._present(self._now)
        return found

    def _present(self, total: int) -> Level:
        return Level(total, self._of["gradients"], self._of["activations"])

    def _reach(self, total: int) -> None:
        if total > self._level.total:
            self._level = self._present(total)

    # -- pieces

    def _hold(self, id_: int, *pieces: _Piece) -> None:
        """`id_` holds `pieces`, and what it held before no more."""
        for piece in pieces:
            if not piece.holders:
                piece.kind = piece.kind or self._kinds.get(id_, "others")
                self._now += piece.nbytes
                self._of[piece.kind] += piece.nbytes
            piece.holders += 1
        self._reach(self._now)
        old, self._held[id_] = self._held.get(id_, []), list(pieces)
        self._release(old)

    def _release(self, pieces: Sequence[_Piece]) -> None:
        for piece in pieces:
            piece.holders -= 1
            if not piece.holders:
                self._now -= piece.nbytes
                self._of[piece.kind or "others"] -= piece.nbytes

    def _fresh(self, id_: int, laid: Laid) -> None:
        self._laid[id_] = laid
        self._hold(id_, _Piece(laid.nbytes))

    def _working(self, nbytes: int) -> None:
        self._reach(self._now + nbytes)

    def free(self, instruction: Instruction) -> None:
        """What the instruction frees."""
        for id_ in instruction.frees:
            self._release(self._held.pop(id_, []))

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

    def begin(self, code: Sequence[Instruction], order: Sequence[tuple[int, int]] = ()) -> None:
        """A loop of `code` begins, whose parts are run in `order`."""
        now, self._under_way = 0, 0
        for part, _ in order:
            now += 1 if part == 0 else -1
            self._under_way = max(self._under_way, now)
        end = next(at for at, i in enumerate(code) if i.op == "end_repeat")
        taken = {i.args[0].id for i in code[:end] if i.op == "take"}
        self._in_turns = {i.outs for i in code[:end] if i.op == "collect"} & taken

    def begin_part(self) -> None:
        """Behind the first forward: the others that are under way have been done, too."""
        for list_ in self._in_turns:
            if list_ in self._held:
                (own,) = self._held[list_]
                self._hold(list_, _Piece(own.nbytes * (self._under_way - 1)), own)

    # -- instructions

    def add(self, instruction: Instruction) -> None:
        """Everything but the bounds of loops."""
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
            self._hold(out, _Piece(result.nbytes) if result.shares is None else self._piece(given[result.shares]))
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

    def _piece(self, id_: int) -> _Piece:
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
        message = _Piece(sum(x.nbytes for x in laid)) if found.early else _Piece(0)
        self._footprints[handle], self._results[handle] = found, laid
        self._hold(handle, _Piece(found.held, "others"), message)

    def _wait(self, instruction: Instruction) -> None:
        handle = instruction.args[0].id
        if handle not in self._footprints:  # of a sum in place
            return
        found, laid = self._footprints.pop(handle), self._results.pop(handle)
        joined = self._held[handle][1] if found.early else _Piece(sum(x.nbytes for x in laid))
        for out, x in zip(flat_ids(instruction.outs), laid, strict=True):
            self._laid[out] = x
            self._hold(out, joined if found.joined else _Piece(x.nbytes))
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
        memory = _Piece(sum(x.nbytes for x in laid))
        for out, x in zip(outs, laid, strict=True):
            self._laid[out] = x
            self._hold(out, memory)

    # -- messages

    def _send(self, instruction: Instruction) -> None:
        self._working(sum(self._laid[x.id].nbytes for x in instruction.args[0]))

    def _receive(self, instruction: Instruction) -> None:
        _, shapes, dtype = instruction.args
        self._joined(instruction.outs, shapes, dtype)

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
            return
        own = self._piece(x)
        if list_ in self._in_turns:
            self._hold(list_, *self._held[list_], own)
            return
        passes_between = _Piece(own.nbytes * (self._mesh.steps - 2))
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
