"""Values that a script still holds when a step ends, and never uses: `outputs.logits`, kept only because `outputs` is.

The first time such a large value is kept, and watched. If it dies unused, the call that makes it is marked, and later
steps do not keep its result.
"""

from __future__ import annotations

import weakref

from moai.capture.trace import Call
from moai.capture.values import Record, Usage
from moai.graph.step_graph import TensorType

# Smaller results are always kept.
KEEP_BYTES = 1 << 20


class HeldValues:
    """The large results kept by earlier steps whose fate is not known yet."""

    def __init__(self) -> None:
        self._watched: list[tuple[weakref.ref[Record], Call, Usage]] = []

    def droppable(self, record: Record) -> bool:
        """Large, made by the forward pass of this segment, and after an earlier step held but never used."""
        call = record.made_by
        if (
            call is None
            or call.origin.phase != "forward"
            or TensorType(record.base[0], record.base[2]).nbytes <= KEEP_BYTES
        ):
            return False
        if not call.kept_unused:
            record.usage = Usage()
            self._watched.append((weakref.ref(record), call, record.usage))
        return call.kept_unused

    def learn(self) -> None:
        """Look at the large results kept by earlier steps: those that died without a use need not be kept again."""
        still_alive = []
        for ref, call, usage in self._watched:
            if ref() is None:
                call.kept_unused = not usage.used
            elif not usage.used:
                still_alive.append((ref, call, usage))
        self._watched = still_alive


def dropped_text(record: Record) -> str:
    """What a person is told who wants a value that was not kept."""
    size, _, dtype = record.base
    call = record.made_by
    where = f" at {call.origin.where}" if call is not None and call.origin.where else ""
    mib = TensorType(size, dtype).nbytes / 2**20
    return (
        f"The value of this {dtype} tensor of shape {list(size)} ({mib:.0f} MiB), computed{where}, was not kept when "
        "its step ended: the script had held such a tensor after an earlier step without using it. Use it (print, "
        ".argmax(), .cpu(), ...) "
        "before the loss is read or the next batch is uploaded, or set MOAI_KEEP_OUTPUTS=1 to keep all of them."
    )
