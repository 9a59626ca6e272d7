"""A worker: one process that owns one device, keeps buffers on it and runs programs. `python -m moai.runtime.worker`.

In: a `WorkerSpec` as a line of JSON on standard input, then commands (`messages`). Out: replies, and a pulse a second.

Three threads: one receives (so that a vanished controller ends the process at once, whatever it is doing), the main
thread carries out commands in order, one reports.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Client

import torch
from torch.distributed import TCPStore

from moai.lower.program import Program
from moai.runtime import files, measure
from moai.runtime import messages as m
from moai.runtime.clock import Clock
from moai.runtime.collectives import NAMES, Distributed, Network
from moai.runtime.compiled import policy
from moai.runtime.executor import Executor, InstructionError
from moai.runtime.inductor import Compiler
from moai.runtime.launcher import WorkerSpec
from moai.runtime.transport import PIECE_BYTES, Channel, memory_of, pieces

PULSE_SECONDS = 1.0
# A CPU worker keeps freed memory (`launcher.worker_environment`), but not that of a model which the script has dropped.
_RETURNED_BYTES = 256 << 20


class Worker:
    """See the module docstring."""

    def __init__(self, spec: WorkerSpec, channel: Channel) -> None:
        self._spec = spec
        self._channel = channel
        self._device = torch.device(spec.device.torch_name)
        self._network: Network | None = None
        self._buffers: dict[int, torch.Tensor] = {}
        self._executors: dict[str, Executor] = {}
        self._compiler = Compiler(self._device, self._say)
        self._compile = policy(os.environ)
        self._inbox: queue.SimpleQueue[tuple[m.Command, torch.Tensor | None]] = queue.SimpleQueue()
        self._doing = ""
        self._loading = False
        self._executor: Executor | None = None
        self._executed = 0
        self._meter = _Meter(self._device)
        self._main = threading.get_ident()

    def serve(self) -> None:
        """Carries out commands until the process is ended; after a failed one it only waits for that."""
        receiver = threading.Thread(target=self._receive, name="receive", daemon=True)
        receiver.start()
        try:
            self._join()
            threading.Thread(target=self._report, name="report", daemon=True).start()
            if self._spec.cores:
                # This thread and the kernels' threads, which it will start. Those of the collectives, started above,
                # stay free to run elsewhere: a small collective must not wait for its turn on the same core.
                os.sched_setaffinity(0, self._spec.cores)
            self._channel.send(m.Ready())
            while True:
                self._carry_out(*self._inbox.get())
        except InstructionError as error:
            self._channel.send(m.Failed(str(error), error.in_collective))
        except Exception as error:
            traceback.print_exc()
            self._channel.send(m.Failed(f"{type(error).__name__}: {error}", in_collective=False))
        receiver.join()

    def _join(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        if self._spec.size > 1:
            store = TCPStore(*self._spec.store, is_master=False)
            self._network = Distributed(self._device, self._spec.rank, self._spec.size, store)

    def _say(self, text: str) -> None:
        if self._spec.rank == 0:
            self._channel.send(m.Note(text))

    # The receiving thread.

    def _receive(self) -> None:
        try:
            while True:
                command = self._channel.receive()
                if isinstance(command, m.Ping):
                    self._channel.send(self._pulse(command.request))
                elif isinstance(command, m.Put):
                    self._inbox.put((command, self._receive_tensor(command)))
                else:
                    self._inbox.put((command, None))
        except (EOFError, OSError):
            os._exit(0)  # the controller has hung up or is gone
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _receive_tensor(self, put: m.Put) -> torch.Tensor:
        if put.zeros:
            return torch.zeros(put.shape, dtype=put.dtype, device=self._device)
        x = torch.empty(put.shape, dtype=put.dtype, device=self._device)
        if self._device.type == "cpu":
            self._channel.receive_into(memory_of(x))
            return x
        target = x.view(-1).view(torch.uint8)
        staging = torch.empty(min(PIECE_BYTES, x.nbytes), dtype=torch.uint8, pin_memory=True)
        for start in range(0, x.nbytes, PIECE_BYTES):
            piece = target[start : start + PIECE_BYTES]
            self._channel.receive_into(memory_of(staging[: piece.numel()]))
            piece.copy_(staging[: piece.numel()])
        return x

    # The main thread.

    def _carry_out(self, command: m.Command, tensor: torch.Tensor | None) -> None:
        with self._meter:
            match command:
                case m.Put():
                    assert tensor is not None
                    self._buffers[command.buffer] = tensor
                case m.PutSmall(tensors):
                    for small in tensors:
                        x = torch.frombuffer(bytearray(small.content), dtype=small.dtype)
                        self._buffers[small.buffer] = x.view(small.shape).to(self._device)
                case m.Run():
                    self._run(command)
                case m.Read():
                    self._doing = "read"
                    self._read(command)
                case m.Write():
                    self._doing = f"write {command.file}"
                    self._write(command)
                case m.Free():
                    self._free(command)
                case m.Load():
                    self._load(command.program, command.timed)
                case m.Unload(names):
                    for name in names:
                        self._executors.pop(name, None)
            self._doing = ""

    def _load(self, program: Program, timed: bool) -> None:
        self._doing = f"load program {program.name}"
        self._loading = True
        clock = Clock(self._device) if timed else None
        self._executors[program.name] = Executor(
            program,
            self._spec.rank,
            self._device,
            self._network,
            None if timed else self._compiler,
            self._compile,
            clock,
        )
        self._loading = False

    def _run(self, command: m.Run) -> None:
        executor = self._executors[command.program]
        slots = executor.program.inputs
        inputs = [
            self._buffers.pop(buffer) if slot.donated else self._buffers[buffer]
            for slot, buffer in zip(slots, command.inputs, strict=True)
        ]
        self._executor = executor
        begin = time.perf_counter()
        try:
            outputs = measure.run(executor, inputs, command.scalars)
        finally:
            self._executor = None
        self._executed += len(executor.program.instructions)
        self._doing = "waiting for the GPU"
        self._finish_kernels()
        seconds = time.perf_counter() - begin
        self._buffers.update(zip(command.outputs, outputs, strict=True))
        self._channel.send(m.Done(command.step, seconds, executor.instruction_seconds()))

    def _free(self, command: m.Free) -> None:
        # A buffer is absent if Ctrl-C fell into its upload.
        freed = sum(self._buffers.pop(id).nbytes for id in command.buffers if id in self._buffers)
        if freed >= _RETURNED_BYTES and self._device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)

    def _finish_kernels(self) -> None:
        if self._device.type == "cuda":
            done = torch.cuda.Event(blocking=True)
            done.record()
            done.synchronize()

    def _read(self, command: m.Read) -> None:
        x = self._buffers[command.buffer].resolve_conj().resolve_neg().cpu()
        offset = 0
        for piece in pieces(x):
            # One message each, so that pulses get through in between.
            self._channel.send(m.Part(command.request, offset, len(piece)), [piece])
            offset += len(piece)

    def _write(self, command: m.Write) -> None:
        error = None
        try:
            file = os.open(command.file, os.O_WRONLY)
            try:
                for region in command.regions:
                    x = self._buffers[region.buffer].resolve_conj().resolve_neg().cpu()
                    for _ in files.write(file, x, region.at, region.shape, region.stride):
                        self._executed += 1  # a slow disk is no standstill
            finally:
                os.close(file)
        except OSError as problem:
            error = (problem.errno or 0, problem.strerror or str(problem))
        self._channel.send(m.Written(command.request, error))

    # The reporting thread.

    def _report(self) -> None:
        try:
            while True:
                time.sleep(PULSE_SECONDS)
                self._channel.send(self._pulse(0))
        except OSError:
            pass  # the receiving thread ends the process

    def _pulse(self, request: int) -> m.Pulse:
        # Loading a program, a worker meets those that it will exchange tensors with, and so may wait for them.
        executed, doing, in_collective = self._executed, self._doing, self._loading
        executor = self._executor
        position = executor.position(sys._current_frames().get(self._main)) if executor else None
        if executor and position is not None:
            instruction = executor.program.instructions[position]
            executed += position
            doing = f"{instruction.op} ({instruction.where})" if instruction.where else instruction.op
            in_collective = instruction.op in NAMES
        elif executor and (compiling := self._compiler.doing()):
            doing = compiling
        memory, peak = self._meter.memory()
        return m.Pulse(
            executed, self._meter.cpu_seconds(), doing, in_collective, memory, peak, self._meter.busy(), request
        )


class _Meter:
    """What the process uses. A context manager around the main thread's work, whose share of time is `busy`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._worked = 0.0
        self._began: float | None = None
        self._asked = (time.monotonic(), 0.0)

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        assert self._began is not None
        self._worked += time.monotonic() - self._began
        self._began = None

    def busy(self) -> float:
        now, began = time.monotonic(), self._began
        worked = self._worked + (now - began if began is not None else 0.0)
        (then, before), self._asked = self._asked, (now, worked)
        return min(1.0, max(0.0, (worked - before) / max(now - then, 1e-6)))

    def cpu_seconds(self) -> float:
        """CPU time of the process without that of the calling thread, whose own work is no progress."""
        return time.process_time() - time.thread_time()

    def memory(self) -> tuple[int, int]:
        """Bytes in use now, and at most so far."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        with open("/proc/self/status") as f:
            status = dict(line.split(":", 1) for line in f)
        return int(status["VmRSS"].split()[0]) << 10, int(status["VmHWM"].split()[0]) << 10


def main() -> None:
    """The entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whether Ctrl-C ends the work is the controller's decision
    faulthandler.enable()
    spec = WorkerSpec.from_json(sys.stdin.readline())
    torch.set_num_threads(spec.device.threads)
    channel = Channel(Client(spec.controller, authkey=bytes.fromhex(spec.secret)))
    channel.send(m.Hello(spec.rank, os.getpid()))
    Worker(spec, channel).serve()


if __name__ == "__main__":
    main()
