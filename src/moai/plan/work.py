"""Work: what one device does in a step under a plan, as columns of numbers.

In: `lower.work` reads it off a program, `plan.transformer` writes it for a model that is known by its dims only.
Out: the cost model turns it into seconds and bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from moai.graph.step_graph import Phase  # commands read clusters, and do not wait for torch

# Messages between devices come last.
KINDS = ("matmul", "attention", "stream", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
MESSAGES = KINDS[3:]
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")
PRECISIONS = ("fp64", "fp32", "bf16", "fp16", "fp8", "fp4")
# The last two are of published runs only: no plan shares a sequence ("cp") or experts ("ep").
AXES = ("dp", "tp", "pp", "dp_shard", "dp_replicate", "cp", "ep")
# Operators that may take another time than the moving of their bytes does. The first stands for all others.
OPERATORS = (
    "", "add", "mul", "div", "pow", "exp", "rsqrt", "tanh", "gelu", "gelu_backward", "silu", "silu_backward", "sum",
    "mean", "where", "clone", "_to_copy", "cat", "embedding", "embedding_dense_backward", "native_layer_norm",
    "native_layer_norm_backward", "_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data",
    "_fused_adamw", "_safe_softmax", "tanh_backward", "native_dropout_backward", "random",
)  # fmt: skip


class Task(NamedTuple):
    """One operator or message on one device.

    flops: a multiplication and an addition are two. bytes: read and written in the device's memory. m, n, k: lengths
    of a matrix product, whose batch is flops / 2mnk. launches: calls that the host makes for it. message: bytes of
    the whole that is summed, gathered or scattered, before it is cut into the peers' parts. axis: of the mesh, on
    which the peers lie. until: how many tasks later the result is needed; the device computes meanwhile (1: it
    waits). looped: done in each micro-batch, and not once a step. recomputed: done a second time, for the backward.
    first: belongs to what comes before the layers (the embedding); what belongs neither to it nor to a layer comes
    behind them. late: of the backward, and no other stage waits for it. op: one of OPERATORS.
    """

    kind: str
    phase: Phase
    precision: str = "fp32"
    flops: float = 0.0
    bytes: float = 0.0
    m: float = 0.0
    n: float = 0.0
    k: float = 0.0
    launches: float = 1.0
    message: float = 0.0
    axis: str = "dp"
    until: int = 1
    looped: bool = True
    recomputed: bool = False
    first: bool = False
    late: bool = False
    op: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at the moment when it holds the most. `gradients`: of parameters, as far as they are there;
    `activations`: what the backward of one micro-batch reads, and what is held on the way; `buffers`: messages, copies
    of parameters (gathered, or in another precision), and what kernels work in."""

    parameters: float = 0.0
    gradients: float = 0.0
    states: float = 0.0
    activations: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    def __add__(self, other: Memory) -> Memory:
        return Memory(*[getattr(self, f.name) + getattr(other, f.name) for f in fields(self)])

    def __mul__(self, times: float) -> Memory:
        return Memory(*[getattr(self, f.name) * times for f in fields(self)])


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The tasks of one device in execution order, a column (an array of length n) for each field of Task: `kind`,
    `phase`, `precision`, `axis` and `op` as indices in KINDS, PHASES, PRECISIONS, AXES and OPERATORS. `samples`: in a
    micro-batch, on this device."""

    kind: np.ndarray
    phase: np.ndarray
    precision: np.ndarray
    flops: np.ndarray
    bytes: np.ndarray
    m: np.ndarray
    n: np.ndarray
    k: np.ndarray
    launches: np.ndarray
    message: np.ndarray
    axis: np.ndarray
    until: np.ndarray
    looped: np.ndarray
    recomputed: np.ndarray
    first: np.ndarray
    late: np.ndarray
    op: np.ndarray
    memory: Memory
    samples: float

    @staticmethod
    def of(tasks: Sequence[Task], memory: Memory = Memory(), samples: float = 1.0) -> Work:
        columns: dict[str, Any] = {}
        for at, name in enumerate(Task._fields):
            column: list[Any] = [task[at] for task in tasks]
            if name in _NAMES:
                column = [_NAMES[name].index(x) for x in column]
            columns[name] = np.array(column, dtype=_TYPES.get(name, np.float64))
        return Work(**columns, memory=memory, samples=samples)


_NAMES: dict[str, Sequence[str]] = {
    "kind": KINDS, "phase": PHASES, "precision": PRECISIONS, "axis": AXES, "op": OPERATORS
}  # fmt: skip
_TYPES: dict[str, type] = {
    **dict.fromkeys((*_NAMES, "until"), np.int64),
    **dict.fromkeys(("looped", "recomputed", "first", "late"), np.bool_),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """The work of a step of a model with few layers (`less`, of which `layers` repeat), and of the same with one
    more (`more`). The model itself has `deeper` layers more than the first: each adds what the one more does. Where
    no layers repeat, `layers` and `deeper` are 0, and `more` is `less`.

    For pipeline stages. handed: bytes that a layer gives to the next for a micro-batch, on this device. before: what
    is held for that which comes before the layers; where it is not known (None), the first stage is taken to hold as
    much beside its layers as the last one."""

    less: Work
    more: Work
    layers: int
    deeper: int
    handed: float = 0.0
    before: Memory | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Bytes on a device at each of many places of a step, in the order of time: `total`, and what of it are `gradients`
    and `activations`. At all of them there are `parameters`, of which so many bytes come `before` the layers, and
    `states` that only the optimizer reads. The rest are buffers."""

    total: np.ndarray
    gradients: np.ndarray
    activations: np.ndarray
    parameters: float
    states: float
    before: float


@dataclass(frozen=True, slots=True, eq=False)
class StageWork:
    """What a device of a stage of `layers` layers does and holds; `held`: with one micro-batch under way. `waiting`:
    bytes that each further one under way holds, at the same places; `late`: those that one holds of which gradients of
    weights alone are left to compute."""

    work: Work
    held: Held
    waiting: np.ndarray
    layers: int
    late: float


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of a pipeline: the first one, the last one, and two of those between, of which `deeper` has more
    layers than `middle`: by what these differ, all stages grow and shrink with their layers, of which there are
    `layers`. `handed`: bytes that a stage gives to the next for a micro-batch, on each device."""

    first: StageWork
    middle: StageWork
    deeper: StageWork
    last: StageWork
    layers: int
    handed: float

    def sample(self) -> Stages:
        """Where a device holds the most depends on how layers are dealt: all places stay."""
        return self


@dataclass(frozen=True, slots=True)
class Observation:
    """What a Sample is made of, with memory at every place of the step instead of at its peak: `held` of the step with
    few layers and `held_more` of the one with one more, at the same places. `handed`: as in Sample."""

    less: Work
    more: Work
    held: Held
    held_more: Held
    handed: float
    layers: int
    deeper: int

    def sample(self) -> Sample:
        """The sample, at the place where the model holds the most."""
        held = self.held
        peak = int(np.argmax(held.total + self.deeper * (self.held_more.total - held.total)))
        before = Memory(held.before, held.before, held.before * held.states / max(held.parameters, 1.0))
        return Sample(
            replace(self.less, memory=_memory(held, peak)),
            replace(self.more, memory=_memory(self.held_more, peak)),
            self.layers,
            self.deeper,
            self.handed,
            before,
        )


def _memory(held: Held, place: int) -> Memory:
    total, gradients, activations = (float(x[place]) for x in (held.total, held.gradients, held.activations))
    buffers = total - held.parameters - gradients - held.states - activations
    return Memory(held.parameters, gradients, held.states, activations, buffers)
