"""Nodes of a graph and instructions of a program as elements of strips, and back.

In: a `Record`: what nodes and instructions have in common. Out: a token and the numbers of the values that it uses and
makes, in the order in which they stand in it; and, given other numbers, a record for those.

What treats all layers at once (a fused optimizer, a bucket) has long lists. These are strips of their own, called its
`Lists`: the lists of one length that a record takes and makes belong together, entry by entry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, Generic, NamedTuple, TypeVar

from moai.graph.step_graph import Ref, Scalar, flat_ids
from moai.lower.depth.pattern import Copies, Entry, Strip, interleaved, together

# Shorter lists have no layers in them.
_LONG = 3
# What is equal to some other constant, and is not the same.
_LOOKALIKE = frozenset({float, bool})
_INTEGERS = {int}

T = TypeVar("T")
Path = tuple[Any, ...]
# What makes things like the one at a position, of the args, kwargs, outs, frees and shapes of each.
Make = Callable[[Iterable[Any], Iterable[Any], Iterable[Any], Iterable[Any], Iterable[Any]], Iterator[T]]
Maker = Callable[[int], Make[T]]


class Record(NamedTuple):
    """`op` is anything that can be compared. `shapes` are those of the flat outs, or nothing."""

    op: Hashable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: Any
    frees: tuple[int, ...] = ()
    shapes: tuple[Any, ...] = ()


class Numbers:
    """Values are numbered in the order in which they are made, inputs first; `of` has them by id. Python numbers that
    are passed to the step follow, from `scalars`, which no value reaches. `users`: what uses each of those first."""

    def __init__(self, inputs: Iterable[int], most: int) -> None:
        """`most`: at least the number of values."""
        self.of = {id_: at for at, id_ in enumerate(inputs)}
        self.scalars = most
        self.users: dict[int, Hashable] = {}
        self._met: list[int] = []

    def strip(self, records: Iterable[Record]) -> Strip:
        """The records in order, or plain tuples of their parts. All that is read in them was given, or made by an
        earlier one."""
        of = self.of
        tokens, numbers, made = [], [], [len(of)]
        known: dict[Hashable, int] = {}
        for op, args, kwargs, outs, frees, shapes in records:
            found: list[int] = []
            said = [op, shapes, len(frees)]
            for a in args:
                kind = type(a)
                if kind is Ref:
                    found.append(of[a.id])
                    said.append(Ref)
                elif kind is int:
                    said.append(a)
                else:
                    said.append(self.constant(a, found))
            if kwargs:
                said.append(self.constant(kwargs, found))
            if type(outs) is int:
                of[outs] = number = len(of)
                found.append(number)
            elif outs:
                for out in flat_ids(outs):
                    of[out] = number = len(of)
                    found.append(number)
            if frees:
                found += [of[i] for i in frees]
            said.append(len(found))
            token = known.setdefault(tuple(said), len(known))
            while self._met:
                self.users.setdefault(self._met.pop(), token)
            tokens.append(token)
            numbers.append(found)
            made.append(len(of))
        return Strip(tokens, numbers, (made,))

    def constant(self, a: Any, numbers: list[int]) -> Hashable:
        """What is constant in an argument, as something to compare; `numbers` gets those of the values."""
        kind = type(a)
        if kind is Ref:
            numbers.append(self.of[a.id])
            return Ref
        if kind is tuple or kind is list:
            return a if _INTEGERS.issuperset(map(type, a)) else tuple([self.constant(x, numbers) for x in a])
        if kind is Scalar:
            numbers.append(self.scalars + a.index)
            self._met.append(a.index)
            return Scalar
        if kind is dict:
            return (*a, *[self.constant(x, numbers) for x in a.values()])
        return repr(a) if kind in _LOOKALIKE else a

    def number(self, leaf: Ref | Scalar) -> int:
        return self.of[leaf.id] if type(leaf) is Ref else self.scalars + leaf.index  # type: ignore[union-attr]


class Writer(Generic[T]):
    """Writes records with other numbers, which are the new ids of values; scalars are numbered from `scalars`.
    `maker` says what is made of those like the one at a position."""

    def __init__(self, records: Sequence[Record], scalars: int, maker: Maker[T]) -> None:
        self.scalars = scalars
        self.maker = maker
        self._records = records
        self._refs = _Refs()

    def one(self, at: int, numbers: Iterable[int]) -> T:
        """The record at a position with `numbers`."""
        record, take = self._records[at], iter(numbers).__next__
        args, kwargs = self.args((record.args, record.kwargs), take)
        outs = _outs(record.outs, take)
        return self.made(at, args, kwargs, outs, tuple([take() for _ in record.frees]), record.shapes)

    def made(self, at: int, args: Any, kwargs: Any, outs: Any, frees: Any, shapes: Any) -> T:
        """One like that at a position."""
        return next(self.maker(at)((args,), (kwargs,), (outs,), (frees,), (shapes,)))

    def copies(self, copies: Copies) -> list[T]:
        """Nearly all of a deep program, and most of the time would go here: every element is written for all copies at
        once, argument by argument."""
        columns, n = copies.columns(), len(copies.steps)
        each = zip(copies.elements, copies.bounds, strict=True)
        return list(interleaved([self._column(at, iter(columns[begin:end]).__next__, n) for at, (begin, end) in each]))

    def _column(self, at: int, take: Callable[[], Iterable[int]], n: int) -> Iterator[T]:
        """`n` times the record at a position, with what `take` gives: the numbers that they have in some place."""
        record = self._records[at]
        args, kwargs = self._values(record.args, take, n), self._values(record.kwargs, take, n)
        outs = _ids_of(record.outs, take, n)
        frees = together([take() for _ in record.frees], n)
        return self.maker(at)(args, kwargs, outs, frees, repeat(record.shapes, n))

    def _values(self, a: Any, take: Callable[[], Iterable[int]], n: int) -> Iterable[Any]:
        """An argument, of `n` copies, with what `take` gives in the place of values."""
        kind = type(a)
        if kind is Ref:
            return map(self._refs.__getitem__, take())
        if kind is Scalar:
            return [Scalar(number - self.scalars) for number in take()]
        if _is_constant(a):
            return repeat(a, n)
        if kind is dict:
            return [dict(zip(a, own, strict=True)) for own in self._values(tuple(a.values()), take, n)]
        each = together([self._values(x, take, n) for x in a], n)
        return map(list, each) if kind is list else each

    def args(self, args: Iterable[Any], take: Callable[[], int]) -> tuple[Any, ...]:
        """`args` with what `take` gives in the place of values."""
        found: list[Any] = []
        for a in args:
            kind = type(a)
            if kind is Ref:
                a = self._refs[take()]
            elif kind is tuple:
                a = self.args(a, take)
            elif kind is Scalar:
                a = Scalar(take() - self.scalars)
            elif kind is list:
                a = list(self.args(a, take))
            elif kind is dict:
                a = dict(zip(a, self.args(a.values(), take), strict=True))
            found.append(a)
        return tuple(found)

    def leaf(self, number: int) -> Ref | Scalar:
        return Scalar(number - self.scalars) if number >= self.scalars else self._refs[number]


class _Refs(dict[int, Ref]):
    """One for each value: most are used several times."""

    def __missing__(self, number: int) -> Ref:
        self[number] = ref = Ref(number)
        return ref


def _ids_of(outs: Any, take: Callable[[], Iterable[int]], n: int) -> Iterable[Any]:
    """As `_outs`, of `n` copies."""
    if type(outs) is int:
        return take()
    return repeat(None, n) if outs is None else together([_ids_of(o, take, n) for o in outs], n)


def _outs(outs: Any, take: Callable[[], int]) -> Any:
    if type(outs) is int:
        return take()
    return None if outs is None else tuple([_outs(o, take) for o in outs])


# ---------------------------------------------------------------------- lists

# Where they are in a form.
_OUTS, _FREES = 2, 3


def has_lists(record: Record, least: int = _LONG) -> bool:
    """Whether there may be lists of so many entries in it; a quick look."""
    many = (*record.kwargs.values(), record.outs, record.frees)
    return any(type(x) in (tuple, list) and len(x) >= least and type(x[0]) is not int for x in record.args) or any(
        type(x) is tuple and len(x) >= least for x in many
    )


class Lists:
    """The long lists of a record, in groups of one length. `rest`: numbers of what is in none of them."""

    def __init__(self, record: Record, numbers: Numbers) -> None:
        self._has_shapes = bool(record.shapes)
        self._numbers = numbers
        self._form = _form(record)
        groups: dict[Hashable, list[Path]] = defaultdict(list)
        for path, entries in _long(self._form, ()):
            # What is freed is in some order of its own.
            groups[len(entries), path[0] == _FREES].append(path)
        valued = [g for g in groups.values() if any(_is_leaf(_at(self._form, path)[0]) for path in g)]
        self.groups = tuple(map(tuple, valued))
        self._emptied = _filled(self._form, {path: () for group in self.groups for path in group})
        self.rest: list[int] = []
        numbers.constant(self._emptied, self.rest)

    def strips(self, kind: Callable[[int], Hashable]) -> list[Strip]:
        """A strip for each group. `kind`: what is to be said of a value that the record does not make."""
        return [self._strip(group, kind) for group in self.groups]

    def _strip(self, group: Sequence[Path], kind: Callable[[int], Hashable]) -> Strip:
        columns: list[Sequence[int]] = []
        tokens: list[Sequence[Hashable]] = []
        makes: list[Sequence[int]] = []
        for path in group:
            entries = _at(self._form, path)
            if not _is_leaf(entries[0]):
                tokens.append([repr(e) for e in entries])
                continue
            found = [self._numbers.number(e) for e in entries]
            columns.append(found)
            if path[0] == _OUTS:
                makes.append([*found, found[-1] + 1])
            else:
                tokens.append([kind(n) for n in found])
        known: dict[Hashable, int] = {}  # numbers are compared much faster than what they stand for
        said = [known.setdefault(row, len(known)) for row in together(tokens, len(columns[0]))]
        return Strip(said, list(zip(*columns, strict=True)), makes)

    def written(self, at: int, writer: Writer[T], rest: Iterable[int], entries: Sequence[Sequence[Entry]]) -> T:
        """The record, which is at a position, with other numbers: `rest`, and `entries` for each group."""
        filled: dict[Path, tuple[Any, ...]] = {}
        for group, found in zip(self.groups, entries, strict=True):
            columns = iter(zip(*(own for _, own in found), strict=True))
            for path in group:
                old = _at(self._form, path)
                if _is_leaf(old[0]):
                    filled[path] = tuple(map(writer.leaf, next(columns)))
                else:
                    filled[path] = tuple([old[e] for e, _ in found])
        args, kwargs, outs, frees, shapes = _filled(writer.args(self._emptied, iter(rest).__next__), filled)
        flat = tuple(_flat(outs, shapes)) if self._has_shapes else ()
        return writer.made(at, args, kwargs, _ids(outs), _ids(frees), flat)


def _form(record: Record) -> tuple[Any, ...]:
    """All parts of a record with values as `Ref`, and a shape for each out where that one is."""
    shapes = iter(record.shapes)
    nested = _outs(record.outs, lambda: next(shapes)) if record.shapes else ()
    return (record.args, record.kwargs, _referred(record.outs), _referred(record.frees), nested)


def _referred(ids: Any) -> Any:
    if type(ids) is int:
        return Ref(ids)
    return None if ids is None else tuple([_referred(i) for i in ids])


def _ids(refs: Any) -> Any:
    if type(refs) is Ref:
        return refs.id
    return None if refs is None else tuple([_ids(r) for r in refs])


def _flat(outs: Any, shapes: Any) -> list[Any]:
    """The shapes of all `outs`, in a row."""
    if type(outs) is Ref:
        return [shapes]
    return [s for o, own in zip(outs or (), shapes or (), strict=True) if o is not None for s in _flat(o, own)]


def _is_leaf(x: Any) -> bool:
    return type(x) is Ref or type(x) is Scalar


def _is_constant(x: Any) -> bool:
    kind = type(x)
    if kind is dict:
        x = x.values()
    return all(map(_is_constant, x)) if kind in (tuple, list, dict) else not _is_leaf(x)


def _long(form: Any, path: Path) -> list[tuple[Path, Sequence[Any]]]:
    """Long lists of values, and lists of constants that may belong to such, by where they are."""
    if type(form) is dict:
        return [found for key, value in form.items() for found in _long(value, (*path, key))]
    if type(form) not in (tuple, list):
        return []
    if len(form) >= _LONG and (all(map(_is_leaf, form)) or all(type(x) is tuple and _is_constant(x) for x in form)):
        return [(path, form)]
    return [found for key, value in enumerate(form) for found in _long(value, (*path, key))]


def _at(form: Any, path: Path) -> Any:
    for key in path:
        form = form[key]
    return form


def _filled(form: Any, filled: Mapping[Path, tuple[Any, ...]], path: Path = ()) -> Any:
    """`form` with other lists at some paths."""
    if path in filled:
        return filled[path]
    if type(form) is dict:
        return {key: _filled(value, filled, (*path, key)) for key, value in form.items()}
    if type(form) in (tuple, list):
        return tuple([_filled(value, filled, (*path, key)) for key, value in enumerate(form)])
    return form
