"""Memory in pieces, each of which is held by one or more.

In: who holds what, by and by. Out: the bytes that are held, and the most that were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

Kind = Literal["gradients", "activations", "others"]


class Level(NamedTuple):
    """Bytes that are held at a moment: in all, and what of them are gradients and activations."""

    total: int
    gradients: int = 0
    activations: int = 0


class Piece:
    """Memory that is freed at once, when nobody holds it any more."""

    __slots__ = ("holders", "kind", "nbytes")

    def __init__(self, nbytes: int, kind: Kind | None = None) -> None:
        self.nbytes = nbytes
        self.holders = 0
        self.kind = kind  # if none is given, that of who holds it first


class Pieces:
    """Holders, which are numbers, with their pieces."""

    def __init__(self, kinds: Mapping[int, Kind]) -> None:
        """`kinds`: of what a holder holds; those that it does not have are others."""
        self._kinds = kinds
        self._level = Level(0)
        self._now = 0
        self._of: dict[Kind, int] = {"gradients": 0, "activations": 0, "others": 0}
        self._held: dict[int, list[Piece]] = {}

    def level(self) -> Level:
        """The most that was held since this was asked last."""
        found, self._level = self._level, self._present(self._now)
        return found

    def _present(self, total: int) -> Level:
        return Level(total, self._of["gradients"], self._of["activations"])

    def _reach(self, total: int) -> None:
        if total > self._level.total:
            self._level = self._present(total)

    def _working(self, nbytes: int) -> None:
        """So much more is held for a moment."""
        self._reach(self._now + nbytes)

    def _hold(self, holder: int, *pieces: Piece) -> None:
        """`holder` holds `pieces`, and what it held before no more."""
        for piece in pieces:
            if not piece.holders:
                piece.kind = piece.kind or self._kinds.get(holder, "others")
                self._now += piece.nbytes
                self._of[piece.kind] += piece.nbytes
            piece.holders += 1
        self._reach(self._now)
        old, self._held[holder] = self._held.get(holder, []), list(pieces)
        self._release(old)

    def _release(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            piece.holders -= 1
            if not piece.holders:
                self._now -= piece.nbytes
                self._of[piece.kind or "others"] -= piece.nbytes

    def _let_go(self, holders: Iterable[int]) -> None:
        for holder in holders:
            self._release(self._held.pop(holder, []))
