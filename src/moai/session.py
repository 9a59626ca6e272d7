"""The session: one process's life on its accelerator.

In: segments from `capture`. Out: their results. It ties the rooms together: first use -> resources -> capture -> plan
-> lower -> run -> release. One a process; made at the device's first use, connected at the first step.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from moai.capture.held import KEEP_BYTES
from moai.capture.recorder import Recorder, Segment
from moai.capture.values import Value
from moai.device import backend, options
from moai.device.storage import maker
from moai.graph.placement import Mesh, Placement
from moai.graph.step_graph import StepGraph, has_backward, tokens
from moai.lower import lower_cached
from moai.lower.program import Program, Slot
from moai.plan import parse
from moai.plan.choose import ChosenPlan, choose
from moai.plan.errors import PlanError
from moai.plan.nearest import lighter
from moai.plan.options import Options
from moai.plan.plan import Plan
from moai.planning.planner import Planner
from moai.platform import accelerators, admission, jobs, log, precision, tracebacks
from moai.platform.admission import Lease
from moai.platform.errors import StateError, memory_error
from moai.platform.flavors import Flavor
from moai.platform.progress import Waiting
from moai.platform.speed import Speedometer
from moai.platform.telemetry import Publisher
from moai.runtime.accelerator import Accelerator
from moai.runtime.buffers import Buffer, in_space
from moai.runtime.files import write_at
from moai.runtime.messages import Pulse

logger = logging.getLogger("moai")


# Uploads from this size on show their progress, and give the memory of the host's copies back to the system.
_LARGE_UPLOAD = 64 << 20
# How long a step that does not fit may be kept from its error by the search for a plan that it would fit with.
_SUGGESTION_SECONDS = 5.0


# How the inputs of a graph lie on the devices; None where they do not lie there yet.
Given = tuple[Placement | None, ...]


def _give_memory_back() -> None:
    """glibc keeps freed memory for later; a model's worth of it is not wanted again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _end_job(lease: Lease, peak_bytes: int, tokens_per_s: float | None) -> None:
    try:
        jobs.finish(lease.job_id, peak_bytes, tokens_per_s)
    except StateError as error:
        logger.warning("The end of job %d could not be noted: %s", lease.job_id, error)


def _note_plan(lease: Lease, line: str) -> None:
    try:
        jobs.planned(lease.job_id, line)
    except StateError as error:
        logger.warning("The plan of job %d could not be noted: %s", lease.job_id, error)


class Session:
    """See the module docstring. `recorder` is what the device's kernels talk to; `flavor` the accelerator's size.

    Raises ValueError or RuntimeError if the user asked for a flavor that there is not, or a plan that cannot be.
    """

    def __init__(self) -> None:
        tracebacks.install()
        self._choice = accelerators.choose()
        self.flavor: Flavor = self._choice.flavor
        self._options, self._chosen = self._choose_plan()  # a forced plan that cannot be is refused here, the earliest
        self.recorder = Recorder(maker, self._execute, self._fetch, self._report_new_graph, self._forget)
        backend.install(self.recorder)
        self._accelerator: Accelerator | None = None
        self._lease: Lease | None = None
        self._telemetry: Publisher | None = None
        self._programs: dict[int, list[tuple[Given, Program]]] = {}  # by the graph's id
        self._speed = Speedometer()
        self._first_run = False
        self._graphs: list[StepGraph] = []  # keeps the ids used above from being given again
        self._noted: set[str] = set()
        self._replanned = False
        self._pid = os.getpid()
        register_optimizer_step_pre_hook(self._optimizer_step_begins)
        register_optimizer_step_post_hook(self._optimizer_step_ends)
        atexit.register(self.close)

    # ------------------------------------------------------------------ resources

    def acquire(self) -> Accelerator:
        """The connected accelerator; connects at the first call, with the log lines of a starting program."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "The accelerator cannot be used in a forked process. Use it in the main process only, or start "
                "processes by multiprocessing's 'spawn' method."
            )
        if self._accelerator is None:
            log.install()
            self._options, self._chosen = self._choose_plan()  # now that the script's options are known
            if self._chosen.allowed is not None:
                log.planning()
            log.requesting()
            self._lease = self._admit()
            try:
                self._accelerator = self._connect()
            except BaseException:
                self._release()
                raise
        return self._accelerator

    def _choose_plan(self) -> tuple[Options | None, ChosenPlan]:
        """What the script has asked for so far, and the plan that follows."""
        asked = options.current()
        forced = os.environ.get(parse.VARIABLE) or None
        device = self.flavor.devices[0]
        return asked, choose(self.flavor.n_devices, forced, asked, lambda: precision.bf16_is_faster(device))

    def _report_plan(self) -> None:
        if self._chosen.asked_for:
            logger.info("Configuration for parallelism is selected.")
            logger.info(self._chosen.plan.line())
        for note in self._chosen.notes:
            logger.info(note)
        if self._chosen.warning:
            logger.warning(self._chosen.warning)

    def _admit(self) -> Lease | None:
        """Waits for devices; None, and no waiting for others, where the state folder cannot be used."""
        try:
            lease = admission.acquire(self._choice, plan=self._chosen.plan.line())
        except StateError as error:  # bookkeeping must not stop a training run
            logger.warning("No job ID: %s", error)
            return None
        self.flavor = replace(self.flavor, devices=lease.devices)
        self._telemetry = Publisher(lease.job_id, lease.devices, self._reports)
        return lease

    def _reports(self) -> Sequence[Pulse | None]:
        accelerator = self._accelerator
        return [None] * self.flavor.n_devices if accelerator is None else accelerator.pulses

    def _connect(self) -> Accelerator:
        log.initializing()
        with Waiting("Starting the devices"):
            accelerator = Accelerator(self.flavor.devices)
        log.connecting(accelerator.addresses)
        log.establishing()
        log.ready(self._lease.job_id if self._lease is not None else None)
        self._report_plan()
        return accelerator

    def close(self) -> None:
        """Release the devices. What was recorded and never read is dropped."""
        if os.getpid() == self._pid:
            self._release()

    def _release(self) -> None:
        """End the workers, then the job: others may have its devices."""
        peak_bytes = 0
        if self._telemetry is not None:
            self._telemetry.stop()
            peak_bytes = self._telemetry.peak_bytes
        accelerator, self._accelerator = self._accelerator, None
        lease, self._lease, self._telemetry = self._lease, None, None
        try:
            if accelerator is not None:
                accelerator.close()
        finally:
            if lease is not None:
                _end_job(lease, peak_bytes, self._speed.tokens_per_s)

    def synchronize(self) -> None:
        """Run what is recorded and wait until the devices are idle."""
        self.recorder.flush()
        if self._accelerator is not None:
            self._accelerator.synchronize()

    def write(self, tensors: Sequence[tuple[torch.Tensor, int]], file: str) -> None:
        """Writes contiguous accelerator tensors into a file, which is there, each from a byte on: the devices what they
        hold, the rest a tensor at a time. OSError if it cannot be done."""
        on_devices = []
        with open(file, "r+b") as out:
            for tensor, at in tensors:
                buffer = self.recorder.resident(tensor)
                if buffer is not None and not buffer.placement.partial:
                    on_devices.append((buffer, at))
                else:
                    write_at(out.fileno(), at, self.recorder.read(tensor))
        if on_devices:
            self.acquire().write(on_devices, file)

    def memory(self) -> tuple[int, int, int]:
        """Bytes over all devices: used, the most ever used, and all there are."""
        total = self.flavor.memory_bytes
        if self._accelerator is None:
            return 0, 0, total
        figures = self._accelerator.memory()
        return sum(used for used, _ in figures), sum(peak for _, peak in figures), total

    # ------------------------------------------------------------------ steps

    def _optimizer_step_begins(self, *_: Any) -> None:
        self.recorder.optimizer_step_begins()

    def _optimizer_step_ends(self, *_: Any) -> None:
        self.recorder.optimizer_step_ends()

    def _report_new_graph(self, graph: StepGraph, cause: str) -> None:
        if cause:
            logger.info("New graph of %d operators: %s", len(graph.nodes), cause)

    def _forget(self) -> None:
        """The script's steps keep changing: start over with what is known of them."""
        logger.info("The script's steps have differed so often that what was learned of them is forgotten.")
        self._programs.clear()
        self._graphs.clear()
        self.acquire().forget()

    def _execute(self, segment: Segment) -> list[Buffer]:
        accelerator = self.acquire()
        self._bring_home(segment)
        given = tuple(None if v.buffer is None else v.buffer.placement for v in segment.inputs)
        program = self._program(segment.graph, given, lambda: max(self._other_bytes(segment)))
        self._check_memory(program, segment)
        self._upload(program, segment)
        outputs = accelerator.run(program, [v.buffer for v in segment.inputs], segment.scalars)
        if segment.graph.trains:
            self._speed.step(tokens(segment.graph))
        return outputs

    def _bring_home(self, segment: Segment) -> None:
        """What ran before the plan was chosen (an evaluation, say) has left values as another plan has them: they come
        back to the host, and the chosen plan places them."""
        plans_now = self._chosen.allowed is not None and has_backward(segment.graph)
        if not plans_now and not self._replanned:
            return
        mesh = in_space(self._chosen.plan.mesh)
        for value in segment.inputs:
            buffer = value.buffer
            if buffer is not None and (plans_now or buffer.mesh != mesh):
                if value.host is None:
                    value.host = self.acquire().read(buffer)
                value.buffer = None

    def _program(self, graph: StepGraph, given: Given, taken: Callable[[], int]) -> Program:
        """`taken`: bytes of a device that hold other things than the graph's inputs."""
        known = self._programs.setdefault(id(graph), [])
        # Compared, as hundreds of placements are mostly the very same objects, and hashing reads all of them.
        program = next((program for its, program in known if its == given), None)
        if program is None:
            program = self._prepare(graph, given, taken)
            known.append((given, program))
            self._first_run = True  # the next wait may be long enough to be explained
            self._graphs.append(graph)
            for note in program.notes:
                if note not in self._noted:
                    self._noted.add(note)
                    logger.info(note)
        return program

    def _prepare(self, graph: StepGraph, given: Given, taken: Callable[[], int]) -> Program:
        """A program for a graph that is new; its plan first, if it is the first one that trains."""
        if self._chosen.allowed is not None and has_backward(graph):
            planner = Planner(self.flavor, self._chosen.allowed, self._chosen.plan.precision)
            planned = planner.choose(graph, given, taken())
            self._replanned = bool(self._graphs)
            for programs in self._programs.values():
                programs.clear()  # they are of the plan until now
            self._chosen = ChosenPlan(planned.plan, f'The plan "{planned.plan}", which was chosen', True)
            if self._lease is not None:
                _note_plan(self._lease, planned.line)
            return planned.program
        with Waiting(f"Preparing a graph of {len(graph.nodes)} operators"):
            return self._lower(graph, given)

    def _lower(self, graph: StepGraph, given: Given) -> Program:
        if options.current() != self._options:
            self._options = options.current()
            logger.warning("The options of torch.moreh.option come after the first step: they do not change its plan.")
        try:
            return lower_cached(graph, self._chosen.plan, given)
        except PlanError as error:
            raise PlanError(f"{self._chosen.origin}: {error.reason}", error.nearest) from None

    def _check_memory(self, program: Program, segment: Segment) -> None:
        """Refuse a step that would not fit, before anything moves."""
        available = min(d.memory_bytes for d in self.flavor.devices)
        resident = self.acquire().resident_bytes
        if program.peak_bytes + resident <= available:  # the inputs counted twice: enough, mostly
            return
        stages = program.stages or (program,)
        needed, others = max(
            (stage.peak_bytes + others, others)
            for stage, others in zip(stages, self._other_bytes(segment, len(stages)), strict=True)
        )
        if needed > available:
            other = self._fitting_plan(segment.graph, available - others)
            raise memory_error(needed, available, f'{parse.VARIABLE}="{other}"' if other else "")

    def _other_bytes(self, segment: Segment, stages: int = 1) -> list[int]:
        """Bytes of a device of each stage that hold other things than the segment's inputs."""
        inputs = {id(v.buffer): v.buffer for v in segment.inputs if v.buffer is not None}
        return [self.acquire().beside(inputs.values(), stage) for stage in range(stages)]

    def _fitting_plan(self, graph: StepGraph, available: int) -> Plan | None:
        """The nearest plan under which a device needs at most `available` bytes for `graph`, if one is found soon."""
        deadline = time.monotonic() + _SUGGESTION_SECONDS
        for plan in lighter(self._chosen.plan):
            if time.monotonic() > deadline:
                break
            try:
                program = lower_cached(graph, plan, [None] * len(graph.inputs))
            except (PlanError, RuntimeError):  # this graph cannot be run so
                continue
            if program.peak_bytes <= available:
                return plan
        return None

    def _upload(self, program: Program, segment: Segment) -> None:
        waiting = [(v, slot) for v, slot in zip(segment.inputs, program.inputs, strict=True) if v.buffer is None]
        nbytes = sum(slot.type.nbytes for _, slot in waiting)
        if nbytes < _LARGE_UPLOAD:  # a batch
            for value, slot in waiting:
                self._upload_one(value, slot, program.mesh)
            return
        with Waiting("Uploading", total=len(waiting)) as progress:
            for value, slot in waiting:
                self._upload_one(value, slot, program.mesh)
                progress.advance()
        _give_memory_back()

    def _upload_one(self, value: Value, slot: Slot, mesh: Mesh) -> None:
        if value.buffer is None:  # the same value may be several inputs
            assert value.host is not None
            value.buffer = self.acquire().upload(value.host, slot.placement, mesh)
            if value.host.nbytes > KEEP_BYTES:
                value.host = None

    def _fetch(self, buffer: Buffer) -> torch.Tensor:
        if not self._first_run:
            return self.acquire().read(buffer)
        self._first_run = False
        with Waiting("Running the first step of a new graph"):
            return self.acquire().read(buffer)


_current: Session | None = None


def current() -> Session:
    """The process's session; made at the first call."""
    global _current
    if _current is None:
        _current = Session()
    return _current
