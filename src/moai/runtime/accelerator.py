"""Accelerator: the controller of the workers, one a device.

In: CPU tensors with a placement, Programs. Out: Buffers, and CPU tensors read back. Everything is asynchronous, but
never more than one run ahead of the devices, and every wait ends with an error when a worker dies, fails or hangs.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from moai.graph.placement import REPLICATE, Mesh, Placement, local_shape
from moai.graph.step_graph import TensorType
from moai.lower.program import Program
from moai.platform.device import Device
from moai.runtime import files
from moai.runtime import messages as m
from moai.runtime.buffers import Buffer, Freed, Resident, Taken, growth, in_space, taken
from moai.runtime.compiled import policy
from moai.runtime.launcher import Launcher, LocalLauncher
from moai.runtime.link import Link
from moai.runtime.parts import check_split, holders, part_at, total
from moai.runtime.transport import encode, memory_of
from moai.runtime.watchdog import Watchdog

logger = logging.getLogger("moai")

START_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_STOP_SECONDS = 2.0
# When a collective fails, the cause is mostly a worker that has just died: wait this long for the better explanation.
_SUSPICION_SECONDS = 3.0
# Tensors up to this size are copied, so that an upload returns at once; larger ones are sent from where they lie.
_COPY_BYTES = 1 << 20
_BACKLOG_BYTES = 32 << 20
# Up to this size, a tensor is part of a message and goes with the next command.
_SMALL_BYTES = 1 << 14


class Accelerator:
    """See the module docstring. Methods are for one thread; all raise RuntimeError once a worker has failed."""

    def __init__(self, devices: Sequence[Device], launcher: Launcher | None = None) -> None:
        """Starts one worker a device. RuntimeError if they are not ready within a minute, ValueError for a
        MOAI_COMPILE that cannot be."""
        if not devices:
            raise ValueError("an accelerator needs at least one device")
        policy(os.environ)  # workers read it too, but cannot tell the user as well
        self.devices = tuple(devices)
        self._launcher = launcher or LocalLauncher()
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._suspicion: tuple[float, str] | None = None
        self._frees: deque[Freed] = deque()
        self._resident = Resident()
        self._growth: dict[str, list[Taken]] = {}  # of what is resident, by a run of each program
        self._ids = itertools.count(1)
        self._requests = itertools.count(1)
        self._programs: dict[str, Program] = {}
        self._loaded: set[str] = set()
        self._step = 0
        self._write_errors: dict[int, tuple[int, str]] = {}
        self._run_seconds = [0.0] * len(devices)
        self._instruction_seconds: list[tuple[float, ...]] = [()] * len(devices)
        self._pulses: list[m.Pulse | None] = [None] * len(devices)
        self._stopping = threading.Lock()
        workers = self._launcher.start(self.devices, START_SECONDS)
        self._watchdog = Watchdog(self.devices, time.monotonic())
        self._links = [Link(worker, self._changed) for worker in workers]
        _live.add(self)
        for link in self._links:
            link.start(self._on_reply, self._on_lost)
        threading.Thread(target=self._watch, name="moai-watch", daemon=True).start()

    @property
    def n_devices(self) -> int:
        """How many devices, and workers, there are."""
        return len(self.devices)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the live buffers on the fullest device."""
        return self._resident.most()

    def beside(self, buffers: Iterable[Buffer], stage: int = 0) -> int:
        """Bytes of live buffers, but for `buffers`, on the fullest device of a stage."""
        own = (taken(buffer) for buffer in buffers)
        return self._resident.on(stage) - sum(nbytes for nbytes, stages in own if not stages or stage in stages)

    @property
    def addresses(self) -> list[str]:
        """Each worker's "ip:port"."""
        return [link.worker.address for link in self._links]

    @property
    def pulses(self) -> list[m.Pulse | None]:
        """Each worker's last report; None before the first, a second after the start."""
        return list(self._pulses)

    @property
    def run_seconds(self) -> list[float]:
        """What the last run that is over took each device, by its own clock."""
        return list(self._run_seconds)

    @property
    def instruction_seconds(self) -> list[tuple[float, ...]]:
        """What each instruction of the last run took each device, if its program is timed."""
        return list(self._instruction_seconds)

    def upload(self, tensor: torch.Tensor, placement: Placement, mesh: Mesh) -> Buffer:
        """Puts a CPU tensor on the devices; each is sent its part. Over partial axes, coordinate 0 holds the tensor and
        the others zeros. `tensor` is not needed any more on return. Of memory, it takes no copy of more than 32 MiB."""
        self._check()
        mesh = in_space(mesh)
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if _SMALL_BYTES < tensor.nbytes <= _COPY_BYTES:
            tensor = tensor.clone()
        parts = self._parts(tensor, placement, mesh)
        self._post_frees()
        id = next(self._ids)
        buffer = Buffer(id, TensorType(tuple(tensor.shape), tensor.dtype), placement, mesh, self._frees)
        self._resident.add([taken(buffer)])
        tickets = []
        for rank, part in parts.items():
            shape = local_shape(buffer.type.shape, placement, mesh, mesh.coordinates(rank))
            if part is not None and 0 < part.nbytes <= _SMALL_BYTES:
                part = part.contiguous()  # in a variable: `memory_of` does not keep it
                self._links[rank].put_small(m.Small(id, shape, tensor.dtype, bytes(memory_of(part))))
                continue
            put = m.Put(id, shape, tensor.dtype, zeros=part is None)
            tickets.append((self._links[rank], self._links[rank].post(encode(put), part)))
        if tensor.nbytes > _COPY_BYTES:
            self._wait(lambda: all(link.sent >= ticket for link, ticket in tickets))
        elif tickets:
            self._wait(lambda: all(link.backlog <= _BACKLOG_BYTES for link in self._links))
        return buffer

    def run(
        self, program: Program, inputs: Sequence[Buffer], scalars: Sequence[float | int], timed: bool = False
    ) -> list[Buffer]:
        """Starts `program` and returns its outputs. Waits first until the run before has finished on all devices.

        Donated inputs are consumed: those Buffers cannot be used any more. A program is sent to the workers once.
        `timed`, of its first run: whether all later ones are to fill `instruction_seconds`.
        """
        self._check()
        ids = self._input_ids(program, inputs, scalars)
        self._wait_for_run()
        self._load(program, timed)
        self._post_frees()
        self._step += 1
        mesh = in_space(program.mesh)
        outputs = [Buffer(next(self._ids), slot.type, slot.placement, mesh, self._frees) for slot in program.outputs]
        made = tuple(b._id or 0 for b in outputs)
        commands = []
        for stage in range(mesh.n_stages):
            given = tuple(id for id, slot in zip(ids, program.inputs, strict=True) if slot.placement.on(stage))
            own = tuple(id for id, slot in zip(made, program.outputs, strict=True) if slot.placement.on(stage))
            commands.append(m.Run(self._step, program.name, given, own, tuple(scalars)))
        for buffer, slot in zip(inputs, program.inputs, strict=True):
            if slot.donated:
                buffer._id = None
        self._resident.add(self._growth[program.name])
        self._tell(commands, awaits=("run", self._step))
        return outputs

    def forget(self) -> None:
        """Drops all programs on the devices; one that is run again is sent again."""
        self._check()
        self._broadcast(m.Unload(tuple(self._loaded)))
        self._loaded.clear()
        self._programs.clear()
        self._growth.clear()

    def read(self, buffer: Buffer) -> torch.Tensor:
        """The global tensor, on the CPU; blocks until it is there."""
        self._check()
        id, placement, mesh = self._id_of(buffer), buffer.placement, buffer.mesh
        out = torch.empty(buffer.type.shape, dtype=buffer.type.dtype, device="cpu")
        parts: list[tuple[torch.Tensor, list[torch.Tensor]]] = []  # each with the terms it is the sum of
        targets: dict[int, torch.Tensor] = {}
        for ranks in holders(placement, mesh):
            part = part_at(out, placement, mesh, mesh.coordinates(ranks[0]))
            if len(ranks) == 1 and part.is_contiguous():
                terms = [part]
            else:
                terms = [torch.empty(part.shape, dtype=part.dtype, device="cpu") for _ in ranks]
            parts.append((part, terms))
            targets.update(zip(ranks, terms, strict=True))
        self._fetch(id, targets)
        for part, terms in parts:
            if terms[0] is not part:
                part.copy_(total(terms) if len(terms) > 1 else terms[0])
        return out

    def write(self, tensors: Sequence[tuple[Buffer, int]], file: str) -> None:
        """Writes each tensor, row by row, into `file` from a byte on: every device what it holds, all at once. The path
        is absolute and the file is there; terms of a sum cannot be written. OSError if it cannot be done."""
        self._check()
        regions: dict[int, list[m.Region]] = {}
        for buffer, at in tensors:
            for rank, region in files.regions(buffer, self._id_of(buffer), at):
                regions.setdefault(rank, []).append(region)
        request = next(self._requests)
        asked = [self._links[rank] for rank in regions]
        for link, own in zip(asked, regions.values(), strict=True):
            link.post(encode(m.Write(request, file, tuple(own))), awaits=request)
        self._wait(lambda: all(request not in link.awaited for link in asked))
        if (error := self._write_errors.pop(request, None)) is not None:
            raise OSError(*error, file)

    def synchronize(self) -> None:
        """Waits until the devices have finished what was run."""
        self._check()
        self._post_frees()
        self._wait_for_run()

    def memory(self) -> list[tuple[int, int]]:
        """(bytes in use now, at most so far) of each device: of a CPU worker's process, of a GPU's allocator."""
        self._check()
        self._post_frees()
        request = next(self._requests)
        self._broadcast(m.Ping(request), awaits=("pulse", request))
        self._wait(lambda: all(("pulse", request) not in link.awaited for link in self._links))
        return [(pulse.memory, pulse.peak) for pulse in self._pulses if pulse is not None]

    def close(self) -> None:
        """Ends the workers, at once and whatever they are doing. Later calls raise; closing again does nothing."""
        self._fail("the accelerator is closed")

    # Uploads, runs and reads, in their parts.

    def _parts(self, tensor: torch.Tensor, placement: Placement, mesh: Mesh) -> dict[int, torch.Tensor | None]:
        """What devices get, by rank; None stands for zeros."""
        if tensor.device.type != "cpu":
            raise ValueError(f"upload takes a CPU tensor, not one on {tensor.device}")
        if mesh.n_devices != self.n_devices:
            raise ValueError(f"mesh ({mesh}) is of {mesh.n_devices} device(s), the accelerator has {self.n_devices}")
        for shard in placement.shards:
            check_split(tensor, shard, mesh)
        if placement == REPLICATE:
            return dict.fromkeys(range(self.n_devices), tensor)
        found: dict[int, torch.Tensor | None] = {}
        for rank in range(self.n_devices):
            at = mesh.coordinates(rank)
            if placement.on(mesh.stage(rank)):
                term = all(at[a] == 0 for a in placement.partial)
                found[rank] = part_at(tensor, placement, mesh, at) if term else None
        return found

    def _input_ids(self, program: Program, inputs: Sequence[Buffer], scalars: Sequence[float | int]) -> tuple[int, ...]:
        wanted = (program.mesh.n_devices, len(program.inputs), program.n_scalars)
        if (given := (self.n_devices, len(inputs), len(scalars))) != wanted:
            raise ValueError(
                f"program {program.name} is for (devices, inputs, scalars) = {wanted}, but was given {given}"
            )
        mesh = in_space(program.mesh)
        for i, (buffer, slot) in enumerate(zip(inputs, program.inputs, strict=True)):
            if buffer._fits is slot:  # a weight, say, which most runs are given again
                continue
            whole = buffer.placement == REPLICATE  # what all devices have whole, they have so on every mesh
            if (buffer.type, buffer.placement, mesh if whole else buffer.mesh) != (slot.type, slot.placement, mesh):
                raise ValueError(
                    f"input {i} of program {program.name} is {slot.type}@{slot.placement} on mesh ({mesh}), but was "
                    f"given {buffer}"
                )
            buffer._fits = slot
        ids = tuple(map(self._id_of, inputs))
        if len(set(ids)) < len(ids):
            donated = {id for id, slot in zip(ids, program.inputs, strict=True) if slot.donated}
            if any(ids.count(id) > 1 for id in donated):
                raise ValueError(f"program {program.name} was given one buffer twice, and may overwrite it")
        return ids

    def _id_of(self, buffer: Buffer) -> int:
        if buffer._id is None:
            raise ValueError(f"{buffer} was donated to a run, which has consumed it: use the output that replaced it")
        if buffer._frees is not self._frees:
            raise ValueError(f"{buffer} belongs to another accelerator")
        return buffer._id

    def _load(self, program: Program, timed: bool) -> None:
        known = self._programs.setdefault(program.name, program)
        if known is not program:
            raise ValueError(f"there is another program named {program.name}: names must be unique")
        if program.name not in self._loaded:
            self._loaded.add(program.name)
            self._growth[program.name] = growth(program)
            self._tell([m.Load(program.of(stage), timed) for stage in range(program.mesh.n_stages)])

    def _fetch(self, id: int, targets: Mapping[int, torch.Tensor]) -> None:
        """Fills the contiguous `targets` with the local tensors of devices, by rank."""
        self._post_frees()
        request = next(self._requests)
        command = encode(m.Read(request, id))
        asked = [(self._links[rank], target) for rank, target in targets.items() if target.nbytes]
        for link, target in asked:
            link.read(request, command, target)
        self._wait(lambda: all(request not in link.awaited for link, _ in asked))

    def _broadcast(self, command: m.Command, awaits: object = None) -> None:
        self._tell([command], awaits)

    def _tell(self, commands: Sequence[m.Command], awaits: object = None) -> None:
        """Each stage its own command: the devices of a stage are numbered one after another."""
        devices = self.n_devices // len(commands)
        for stage, encoded in enumerate(map(encode, commands)):
            for link in self._links[stage * devices : (stage + 1) * devices]:
                link.post(encoded, awaits=awaits)

    def _post_frees(self) -> None:
        if not self._frees:
            return
        with self._changed:
            # Buffers die in any thread at any time: take those that are there now.
            dead = tuple(self._frees.popleft() for _ in range(len(self._frees)))
        if dead:
            self._resident.add((what for _, what in dead), -1)
            self._broadcast(m.Free(tuple(id for id, _ in dead)))

    # Waiting and failing.

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Blocks until `ready()`; the watchdog's failure is what bounds it."""
        with self._changed:
            while not ready():
                self._check()
                self._changed.wait(_LOOK_SECONDS)
        self._check()

    def _wait_for_run(self) -> None:
        run = ("run", self._step)
        self._wait(lambda: all(run not in link.awaited for link in self._links))

    def _on_reply(self, rank: int, reply: m.Reply) -> None:
        now = time.monotonic()
        with self._changed:
            self._watchdog.heard(rank, now)
            match reply:
                case m.Done(step, seconds, by_instruction):
                    self._run_seconds[rank] = seconds
                    self._instruction_seconds[rank] = by_instruction
                    self._links[rank].answered(("run", step))
                case m.Written(request, error):
                    if error is not None:
                        self._write_errors[request] = error
                    self._links[rank].answered(request)
                case m.Note(text):
                    logger.warning("%s", text)
                case m.Pulse():
                    self._pulses[rank] = reply
                    if reply.request:
                        self._links[rank].answered(("pulse", reply.request))
                    else:
                        self._watchdog.pulse(rank, reply, now)
        if isinstance(reply, m.Failed):
            text = f"{self._name(rank)} failed in step {self._step}: {reply.text}"
            if not reply.in_collective:
                self._fail(text)
            elif self._suspicion is None:
                self._suspicion = (now + _SUSPICION_SECONDS, text)

    def _on_lost(self, rank: int) -> None:
        process = self._links[rank].worker.process
        deadline = time.monotonic() + _STOP_SECONDS
        while (end := process.end()) is None and time.monotonic() < deadline and self._failure is None:
            time.sleep(0.01)
        text = f"{self._name(rank)} was lost in step {self._step}: its worker {end or 'has hung up'}"
        text += self._watchdog.doing(rank)
        if end and "SIGKILL" in end:
            text += "\nThe system kills a process when memory runs out: try a smaller batch or a larger accelerator"
        elif words := process.last_words():
            text += f"\n{words}"
        self._fail(text)

    def _name(self, rank: int) -> str:
        return f"device {rank} ({self.devices[rank]}, pid {self._links[rank].worker.pid})"

    def _watch(self) -> None:
        while self._failure is None:
            time.sleep(_LOOK_SECONDS)
            now = time.monotonic()
            with self._changed:
                verdict = self._watchdog.verdict([link.at_work for link in self._links], now)
                suspicion = self._suspicion
            if suspicion and now > suspicion[0]:
                self._fail(suspicion[1])
            elif verdict:
                self._fail(f"{self._name(verdict.rank)} {verdict.text} (step {self._step})")
            elif self._failure is None:
                self._post_frees()

    def _fail(self, text: str) -> None:
        """Records why nothing works any more, unless that is known already, and ends the workers."""
        with self._changed:
            if self._failure is not None:
                return
            self._failure = text
            self._changed.notify_all()
        _live.discard(self)
        for link in self._links:
            link.hang_up()
        with self._stopping:
            self._launcher.stop(_STOP_SECONDS)

    def _abandon(self) -> None:
        """In a forked child: the workers are the parent's, and must notice when the parent alone is gone."""
        self._failure = "the accelerator belongs to the process that this one was forked from"
        for link in self._links:
            link.abandon()


_live: weakref.WeakSet[Accelerator] = weakref.WeakSet()


def _close_all() -> None:
    for accelerator in list(_live):
        accelerator.close()


def _abandon_all() -> None:
    for accelerator in list(_live):
        accelerator._abandon()
    _live.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_abandon_all)
