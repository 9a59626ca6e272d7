"""Inductor as this project uses it: regions are compiled in a thread of their own, each distinct one once on a machine.

In: the body of a region, and how the tensors lie that it will meet. Out: a function that stands for it.

Compiled code is kept on disk, and the ranks share it: whoever is second waits for the first, and then finds it there.
What cannot be compiled (there may be no C++ compiler) is said once, and goes on as it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moai.graph.step_graph import Ref, flat_ids, map_args, refs
from moai.lower.cache_folder import home
from moai.lower.cleanup import uses
from moai.lower.program import Instruction
from moai.lower.regions import Region, is_plain_view
from moai.runtime.codegen import Call
from moai.runtime.layout import Layout
from moai.runtime.rivals import Rival, is_faster, rival

Function = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]

# CPU seconds of compiling: to begin with, for a region, for one that is on disk. Measured on two cores of an AMD EPYC.
_START_SECONDS, _REGION_SECONDS, _CACHED_SECONDS = 5.0, 2.0, 0.3
_RIVAL_SECONDS = 0.2  # of trying out whether a kernel's rival is faster
# The longest wait for another rank to compile the same region: then it is done here as well.
_LOCK_SECONDS = 120.0
_NICE = 10


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where compiled code is kept: TORCHINDUCTOR_CACHE_DIR, or else with what else we keep."""
    theirs = environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(theirs) if theirs else home(environ) / "inductor"


class Body:
    """A region's instructions with their calls. `overwritten`: the inputs that an instruction writes into; of these,
    those that are `kept` are read behind the region. `rival`: that of its only instruction."""

    def __init__(self, region: Region, code: Sequence[Instruction], calls: Sequence[Call]) -> None:
        self.region = region
        self._steps = [(call, instruction.outs) for call, instruction in zip(calls, code, strict=True)]
        self.overwritten = _overwritten(code, calls).intersection(region.inputs)
        self.kept = self.overwritten.difference(region.frees)
        self.rival = rival(code[0]) if len(code) == 1 else None

    def rounding(self, layouts: Sequence[Layout]) -> float:
        """The relative rounding error of the coarsest floats that are computed with."""
        named: set[torch.dtype] = {x.dtype for x in layouts}

        def note(leaf: Any) -> None:
            if isinstance(leaf, torch.dtype):
                named.add(leaf)

        for call, _ in self._steps:
            map_args((call.args, call.kwargs), note)
        return max((torch.finfo(dtype).eps for dtype in named if dtype.is_floating_point), default=0.0)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The region's outputs, operator by operator. Overwrites `overwritten`."""
        values: dict[int, Any] = dict(zip(self.region.inputs, inputs, strict=True))

        def filled(leaf: Any) -> Any:
            return values[leaf.id] if isinstance(leaf, Ref) else leaf

        for call, outs in self._steps:
            _bind(outs, call.function(*map_args(call.args, filled), **map_args(call.kwargs, filled)), values)
        return tuple(values[o] for o in self.region.outputs)

    def text(self) -> str:
        """The same for all that do the same, whatever their values are called."""
        names: dict[int, int] = {}

        def named(id_: int) -> int:
            return names.setdefault(id_, len(names))

        def leaf(value: Any) -> Any:
            return f"%{named(value.id)}" if isinstance(value, Ref) else value

        lines = [str([named(i) for i in self.region.inputs])]
        for call, outs in self._steps:
            args = map_args((call.args, call.kwargs), leaf)
            # repr tells 1 from 1.0 and True, and 0.0 from -0.0.
            lines.append(f"{[named(o) for o in flat_ids(outs)]} = {call.function}{args!r}")
        outputs, kept = [named(o) for o in self.region.outputs], sorted(map(named, self.kept))
        return "\n".join([*lines, str(outputs), str(kept)])


def _overwritten(code: Sequence[Instruction], calls: Sequence[Call]) -> set[int]:
    """The tensors that are written into, by themselves or through a view."""
    source: dict[int, int] = {}
    found: set[int] = set()
    for instruction, call in zip(code, calls, strict=True):
        if is_plain_view(instruction):
            (viewed,) = uses(instruction)
            source[instruction.outs] = source.get(viewed, viewed)
        schema = call.function._schema  # type: ignore[attr-defined]
        for argument, value in zip(schema.arguments, call.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found.update(source.get(r.id, r.id) for r in refs(value))
    return found


def _bind(outs: Any, result: Any, values: dict[int, Any]) -> None:
    if isinstance(outs, int):
        values[outs] = result
    elif outs:
        for out, part in zip(outs, result, strict=True):
            _bind(out, part, values)


@dataclass(slots=True)
class Job:
    """A region to be compiled for tensors of `layouts`. When it is `done`, `function` is there, unless that failed or
    the operators are the fastest."""

    key: str
    body: Body
    layouts: tuple[Layout, ...]
    function: Function | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Compiler:
    """One worker's. Methods are for one thread but for `doing`."""

    def __init__(self, device: torch.device, say: Callable[[str], None]) -> None:
        """`say` is told, once, why something is not compiled."""
        self._device = device
        self._say = say
        self._said = False
        self._folder = cache_folder(os.environ)
        self._jobs: dict[str, Job] = {}
        self._inbox: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._began: float | None = None

    def job(self, body: Body, layouts: tuple[Layout, ...]) -> Job:
        """The job of compiling `body`: one for all that do the same."""
        machine = f"{self._device.type} {torch.get_num_threads()} {torch.backends.cpu.get_cpu_capability()}"
        text = f"{torch.__version__} {machine}\n{body.text()}\n{layouts}"
        key = hashlib.sha256(text.encode()).hexdigest()
        return self._jobs.setdefault(key, Job(key, body, layouts))

    def cost(self, jobs: Sequence[Job]) -> float:
        """CPU seconds that it takes to do what is not done yet."""
        fresh = {job.key: job for job in jobs if not job.done.is_set()}
        regions = [key for key, job in fresh.items() if not job.body.rival]
        on_disk = sum(self._mark(key).exists() for key in regions)
        start = 0.0 if self._thread or not regions else _START_SECONDS
        found = start + on_disk * _CACHED_SECONDS + (len(regions) - on_disk) * _REGION_SECONDS
        return found + _RIVAL_SECONDS * (len(fresh) - len(regions))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Have `jobs` done, in this order."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="compile", daemon=True)
            self._thread.start()
        for job in {job.key: job for job in jobs}.values():
            self._inbox.put(job)

    def complain(self, text: str) -> None:
        """Say what is the matter, the first time."""
        if not self._said:
            self._said = True
            self._say(f"{text}. It runs uncompiled; with MOAI_COMPILE=never everything does.")

    def doing(self) -> str:
        """What is being compiled, in words; "" for nothing. Changes every few seconds: it is other processes that
        compile, and this one looks idle."""
        began = self._began
        return "" if began is None else f"compile a region, for {(time.monotonic() - began) // 5 * 5:.0f} s"

    def _work(self) -> None:
        with suppress(OSError):  # the step goes first; on Linux, a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self._folder)
        while True:
            job = self._inbox.get()
            if not job.done.is_set():
                self._began = time.monotonic()
                self._do(job)
                self._began = None
                job.done.set()

    def _do(self, job: Job) -> None:
        try:
            with self._alone(job.key):
                if job.body.rival:
                    job.function = self._faster(job, job.body.rival)
                else:
                    job.function = _compiled(job.body, job.layouts, self._device)
                    self._mark(job.key).touch()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            self.complain(f"A part of the step cannot be compiled ({type(error).__name__}: {reason})")

    def _faster(self, job: Job, rival: Rival) -> Function | None:
        """What was found out once on this machine stays: runs shall not differ by chance."""
        mark = self._mark(job.key)
        if not mark.exists():
            mark.write_text(rival.name if is_faster(rival, job.body, job.layouts) else "")
        return rival.function if mark.read_text() == rival.name else None

    def _mark(self, key: str) -> Path:
        return self._folder / "moai" / key

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Hold the region's lock. It goes with the process."""
        self._mark(key).parent.mkdir(parents=True, exist_ok=True)
        with open(self._mark(f"{key}.lock"), "w") as lock:
            until = time.monotonic() + _LOCK_SECONDS
            while time.monotonic() < until:
                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.05)
            yield


def _compiled(body: Body, layouts: Sequence[Layout], device: torch.device) -> Function:
    # Inductor takes seconds to import: only who compiles pays for it.
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    lost = body.overwritten - body.kept

    def outputs(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Nobody reads again what is written into a tensor that dies here. (The copy is fused away.)
        return body([x.clone() if i in lost else x for i, x in zip(body.region.inputs, inputs, strict=True)])

    with torch.no_grad():
        with FakeTensorMode():
            examples = [torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device=device) for x in layouts]
            # What is written in place comes out as one last copy to the input, which Inductor makes a write in place.
            functional = functionalize(outputs, remove="mutations")
            graph = make_fx(functional, decomposition_table=select_decomp_table())(*examples)
        # More processes would compete with the devices, and outlive a worker that is killed.
        with config.patch(compile_threads=1):
            code: Any = compile_fx_inner(graph, examples, is_inference=True)
    # The object around this function looks for profilers and caches at every call.
    return getattr(code, "current_callable", None) or code
