"""What the one who wants a dry run tells its process, as a file. Nothing here imports torch, which both do at once.

In and out: an `Order`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class ModelStep:
    """`model`: a folder with a config.json, such a file, or a name on the Hugging Face hub; `batch_size` samples of
    `block_size` tokens; `dtype`: of the weights ("float32", ...), that of the config if None."""

    model: str
    batch_size: int
    block_size: int
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What to run: a script with its arguments, or a `ModelStep`. `memory_bytes`: of the accelerator that the script is
    to believe in; `seconds`: the longest that it may take."""

    step: ModelStep | tuple[str, ...]
    memory_bytes: int
    seconds: float

    def text(self) -> str:
        """For `read`."""
        step = asdict(self.step) if isinstance(self.step, ModelStep) else self.step
        return json.dumps([step, self.memory_bytes, self.seconds])


def read(text: str) -> Order:
    """The order that `Order.text` has written."""
    step, memory_bytes, seconds = json.loads(text)
    return Order(ModelStep(**step) if isinstance(step, dict) else tuple(step), memory_bytes, seconds)
