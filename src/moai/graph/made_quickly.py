"""Classes of which a step has tens of thousands of instances.

In: a frozen dataclass. Out: the same class, whose instances are made in a quarter of the time.
"""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Any, TypeVar

C = TypeVar("C", bound=type[Any])


def made_quickly(cls: C) -> C:
    """`cls`, whose instances only the type checker keeps from being changed: at run time, setting every field past its
    own lock is most of what making a frozen dataclass takes. For classes without `__post_init__`."""
    plain = make_dataclass(cls.__name__, [(f.name, f.type, field(default=f.default)) for f in fields(cls)])
    cls.__init__ = plain.__init__  # type: ignore[misc]
    del cls.__setattr__, cls.__delattr__
    return cls
