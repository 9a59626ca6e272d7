"""Python's cyclic garbage collector stands still while millions of objects are made that are in no cycle."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """No cyclic collections inside. The collector walks over all that is alive again and again while more is made: a
    fifth of a lowering's time, and half of the time that it takes to read a program. Nor is there one over all that was
    made at the end: what is alive by then will live long."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            _grow_old()
            gc.enable()


def _grow_old() -> None:
    """All that is alive becomes as what has outlived many collections, without any. Not where a script keeps things
    from collections altogether: these would lose that."""
    if not gc.get_freeze_count():
        gc.freeze()
        gc.unfreeze()
