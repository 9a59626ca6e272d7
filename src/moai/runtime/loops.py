"""The loop over micro-batches: in which order instructions are executed, and what the passes hand on.

In: a Program; tensors of one device. Out: indices of instructions; totals and lists, which are None before the first
pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moai.lower.program import Program
from moai.lower.program_order import runs

REPEAT, BEGIN_PART = "repeat", "begin_part"
CARRYING = frozenset({"accumulate", "collect"})
NAMES = CARRYING | {"take", "join"}


def carried(program: Program) -> tuple[int, ...]:
    """The values that are handed from pass to pass."""
    return tuple(i.outs for i in program.instructions if i.op in CARRYING)


def order(program: Program) -> Iterator[tuple[int, int]]:
    """(index of an instruction, pass of its loop) as they are executed; the pass is 0 where there is no loop."""
    return ((index, step or 0) for part, step in runs(program) for index in part)


def accumulate(total: torch.Tensor | None, x: torch.Tensor, owned: bool) -> torch.Tensor:
    """The sum of the passes so far. `owned`: the memory of `x` may become the total's."""
    if total is None:
        return x if owned else x.clone()
    if x.shape != total.shape:  # adding would broadcast
        raise RuntimeError(f"a pass has {list(x.shape)} for a total of {list(total.shape)}")
    return total.add_(x)


def collect(entries: list[torch.Tensor] | None, x: torch.Tensor) -> list[torch.Tensor]:
    """The list of every pass's `x`."""
    if entries is None:
        return [x]
    entries.append(x)
    return entries


def take(entries: list[torch.Tensor]) -> torch.Tensor:
    """This pass's entry, which leaves the list."""
    return entries.pop(0)


def join(entries: list[torch.Tensor], dim: int) -> torch.Tensor:
    """All entries concatenated, in fresh memory; the list is emptied."""
    joined = torch.cat(entries, dim)
    entries.clear()
    return joined
