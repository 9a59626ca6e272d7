"""What the controller and a worker say to each other: every message of the runtime, and who follows it with raw bytes.

The controller's commands are carried out in the order in which they were sent, but for `Ping`, which a worker answers
at once, even while it computes. There is no command to stop: a worker ends when its connection does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moai.lower.program import Program


@dataclass(frozen=True, slots=True)
class Load:
    """Keep `program` under its name. `timed`: its runs are to tell what each instruction takes,
    and nothing is compiled."""

    program: Program
    timed: bool = False


@dataclass(frozen=True, slots=True)
class Unload:
    """Forget the programs of these names."""

    programs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Put:
    """Make buffer `buffer` of local `shape`: of zeros, or of the bytes of a contiguous tensor that follow."""

    buffer: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    zeros: bool


@dataclass(frozen=True, slots=True)
class Small:
    """A small tensor: buffer, local shape, and its bytes in row-major order, at least one."""

    buffer: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    content: bytes


@dataclass(frozen=True, slots=True)
class PutSmall:
    """Make a buffer of each of these."""

    tensors: tuple[Small, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Run `program` on buffers `inputs`, keep its results as buffers `outputs`; answered by `Done`."""

    step: int
    program: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scalars: tuple[float | int, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Send the content of `buffer`; answered by `Part`s."""

    request: int
    buffer: int


@dataclass(frozen=True, slots=True)
class Region:
    """Where the content of `buffer` lies in a file: as a tensor of geometry `shape` and `stride` (in entries), whose
    first entry is at byte `at`."""

    buffer: int
    at: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Write:
    """Write buffers into `file`, which is there; answered by `Written`."""

    request: int
    file: str
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Free:
    """Forget these buffers."""

    buffers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ping:
    """Send a `Pulse` now; it carries `request`."""

    request: int


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of worker `rank`."""

    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has met its peers."""


@dataclass(frozen=True, slots=True)
class Done:
    """Run `step` is over: its results exist. `seconds`: what it took the worker; `by_instruction`: of a timed program,
    what each instruction took, in all passes."""

    step: int
    seconds: float
    by_instruction: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes [offset, offset + nbytes) of what `request` asked for; they follow."""

    request: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """What `request` asked for is in its file, or is not: the system's number of the error, and its words."""

    request: int
    error: tuple[int, str] | None


@dataclass(frozen=True, slots=True)
class Failed:
    """A command failed and the worker does nothing more. `in_collective`: another worker may be the cause."""

    text: str
    in_collective: bool


@dataclass(frozen=True, slots=True)
class Note:
    """Something that the user should know; work goes on."""

    text: str


@dataclass(frozen=True, slots=True)
class Pulse:
    """A worker's sign of life, one a second.

    `executed` instructions and `cpu_seconds` count from the worker's start (the pulse's own thread not included).
    `doing` names the instruction or command at work, "" when there is none. `memory` and `peak` are bytes: of the
    process for a CPU device, of PyTorch's allocator for a GPU. `busy` is the share of the time since the pulse before
    that was spent on commands. `request` is that of the `Ping` that is answered, 0 otherwise.
    """

    executed: int
    cpu_seconds: float
    doing: str
    in_collective: bool
    memory: int
    peak: int
    busy: float
    request: int = 0


Command = Load | Unload | Put | PutSmall | Run | Read | Write | Free | Ping
Reply = Hello | Ready | Done | Part | Written | Failed | Note | Pulse
