"""Numbers that a library asks for long before anybody looks at them: metrics of a trainer.

In: a block of code in which `item()` of the accelerator's tensors is called. Out: `Later`s, each of which stands for
such a number and fetches it when somebody looks. Waiting for it at once would cut the step in two, behind its forward.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_keeps_waiting = 0  # blocks of `numbers_later` that are being run


class Later:
    """A float that may not be there yet. Within `numbers_later`, what is computed from it is another; everywhere else,
    whatever is done with it gives the float's answer."""

    __slots__ = ("_number",)

    def __init__(self, number: Callable[[], float]) -> None:
        """`number` is called once, if ever."""
        self._number: Callable[[], float] | float = number

    def value(self) -> float:
        """The number itself. Waits for it."""
        if not isinstance(self._number, float):
            self._number = float(self._number())
        return self._number

    __float__ = value

    def __bool__(self) -> bool:
        return bool(self.value())

    def __int__(self) -> int:
        return int(self.value())

    def __hash__(self) -> int:
        return hash(self.value())

    def __repr__(self) -> str:
        return repr(self.value())

    def __format__(self, spec: str) -> str:
        return format(self.value(), spec)

    def __round__(self, digits: int | None = None) -> float:
        return round(self.value(), digits)


def _give(name: str, function: Callable[..., Any], reflected: bool = False) -> None:
    """Give `Later` an operator."""

    def answer(*operands: Any) -> Any:
        def number() -> Any:
            known = [x.value() if isinstance(x, Later) else x for x in operands]
            return function(*(reversed(known) if reflected else known))

        plain = all(isinstance(x, (Later, float, int)) for x in operands)
        return Later(number) if _keeps_waiting and plain else number()

    setattr(Later, f"__{name}__", answer)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _give(_name, getattr(operator, _name))
    _give(f"r{_name}", getattr(operator, _name), reflected=True)
for _name in ("neg", "abs"):
    _give(_name, getattr(operator, _name))


def _compared(name: str) -> Callable[[Later, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: function(self.value(), other.value() if isinstance(other, Later) else other)


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Later, f"__{_name}__", _compared(_name))


@contextmanager
def numbers_later(module: str) -> Iterator[None]:
    """While this holds, `item()` gives a `Later` to code of the module of that name, for tensors of the accelerator
    that hold a number with a fraction. Whole ones decide what is done next, more often than not."""
    global _keeps_waiting
    before, item = vars(torch.Tensor).get("item"), torch.Tensor.item

    def item_later(self: torch.Tensor) -> Any:
        is_asked = sys._getframe(1).f_globals.get("__name__") == module
        if not is_asked or self.device.type == "cpu" or not self.is_floating_point() or self.numel() != 1:
            return item(self)
        kept = self.detach().clone()  # the script may write into its own
        return Later(lambda: item(kept))

    torch.Tensor.item = item_later  # type: ignore[assignment, method-assign]
    _keeps_waiting += 1
    try:
        yield
    finally:
        _keeps_waiting -= 1
        if before is None:
            del torch.Tensor.item
        else:
            torch.Tensor.item = before  # type: ignore[method-assign]
