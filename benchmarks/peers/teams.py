"""Teams: the processes of one variant, and what they did.

In: variants' names, sizes, rounds. Out: `Team`s that have run, none of whose processes is left. A variant that fails
does not stop the others: its team says why.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from benchmarks import results
from benchmarks.child import Child, receive_all
from benchmarks.peers.variants import VARIANTS, is_ours
from benchmarks.training import Sizes
from moai.plan.parse import parse
from moai.platform import accelerators, jobs
from moai.platform.device import Device
from moai.runtime.launcher import cores_of, worker_environment

N_DEVICES = 2
WARM_UP_ROUNDS = 2
_START_SECONDS = 120.0
_BLOCK_SECONDS = 900.0  # the first may compile
# OpenMP's threads spin for a moment after their work: let those of one variant come to rest before the next begins.
_SETTLE_SECONDS = 0.05


@dataclass(slots=True)
class Team:
    """The processes of one variant, and what they did, block by block: seconds and CPU seconds a step, and loss.

    `folder` is where they keep what they write. `peak_bytes` is the largest peak of resident memory of a process that
    computes, `failure` the error that ended them.
    """

    name: str
    folder: Path
    children: list[Child] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failure: str | None = None

    def run_block(self, steps: int) -> None:
        """Run `steps` steps; the clock stops when every process has read its loss. Nothing, once it has failed."""
        if self.failure is not None:
            return
        try:
            self._run_block(steps)
        except (RuntimeError, psutil.Error, OSError) as error:
            self.fail(error)

    def _run_block(self, steps: int) -> None:
        cpu_begin, begin = self._cpu_seconds(), time.perf_counter()
        for child in self.children:
            child.send(steps)
        losses = receive_all(self.children, _BLOCK_SECONDS)
        self.step_s.append((time.perf_counter() - begin) / steps)
        self.cpu_s.append((self._cpu_seconds() - cpu_begin) / steps)
        self.losses.append(sum(losses) / len(losses))
        self.peak_bytes = max(map(results.peak_bytes, self._computing()), default=0)
        self._check_plan()

    def _check_plan(self) -> None:
        """RuntimeError if ours runs another plan than it was told."""
        told = VARIANTS[self.name].plan
        if told is not None:
            runs = jobs.history({"XDG_STATE_HOME": str(self.folder)})[-1].plan
            if runs != parse(told, N_DEVICES).line():
                raise RuntimeError(f"it was told to run {told}, and runs {runs}")

    def fail(self, error: Exception) -> None:
        """End the processes and remember why."""
        self.failure = str(error)
        print(f"{self.name}: {error}", file=sys.stderr, flush=True)
        self.close()

    def close(self) -> None:
        """End the processes."""
        for child in self.children:
            child.close()
        self.children.clear()

    def start_s(self, steps: int) -> float:
        """Seconds by which the warm-up's steps, blocks of `steps`, took longer than as many of the later ones."""
        steady = results.quartiles(self.step_s[WARM_UP_ROUNDS:])["median"]
        return sum(each - steady for each in self.step_s[:WARM_UP_ROUNDS]) * steps

    def _cpu_seconds(self) -> float:
        return sum(results.cpu_seconds(child.pid) for child in self.children)

    def _computing(self) -> list[int]:
        """Ours computes in workers, the script's children; every other variant in its own processes."""
        pids = [child.pid for child in self.children]
        return [worker for pid in pids for worker in results.workers(pid)] if is_ours(self.name) else pids


def take_turns(names: Sequence[str], sizes: Sizes, even: bool, rounds: int, steps: int) -> dict[str, Team]:
    """Run all variants, with `WARM_UP_ROUNDS` more rounds at the start; `even` is as in `Corpus`."""
    teams: dict[str, Team] = {}
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for name in names:
                print(f"starting {name}", file=sys.stderr, flush=True)
                teams[name] = start(name, sizes, even, Path(scratch) / name)
            for turn in range(WARM_UP_ROUNDS + rounds):
                print(f"round {turn + 1} of {WARM_UP_ROUNDS + rounds}", file=sys.stderr, flush=True)
                for name in order.sample(names, len(names)):
                    time.sleep(_SETTLE_SECONDS)
                    teams[name].run_block(steps)
        finally:
            for team in teams.values():
                team.close()
    return teams


def start(name: str, sizes: Sizes, even: bool, folder: Path) -> Team:
    """The processes of a variant, ready to run. All compute with one device's threads, cores and malloc settings.

    What they keep on disk, caches of compiled code among it, goes to `folder`, and is found there the next time.
    """
    devices = accelerators.choose({"MOAI_DEVICES": str(N_DEVICES), "CUDA_VISIBLE_DEVICES": ""}).flavor.devices
    how = VARIANTS[name]
    ranks = len(devices) if how.spread else 1
    folder.mkdir(exist_ok=True)
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    common = {"variant": name, "sizes": asdict(sizes), "even": even, "ranks": ranks, "meeting": str(meeting)}
    team = Team(name, folder)
    try:
        for rank in range(ranks):
            if how.spread:
                threads, cores = devices[rank].threads, cores_of(devices[rank], devices)
            else:
                threads, cores = sum(device.threads for device in devices), ()
            part = common | {"rank": rank, "threads": threads, "cores": cores}
            environment = _environment(name, devices[rank], threads, folder)
            team.children.append(Child(f"{name}, process {rank}", "benchmarks.peers.process:train", part, environment))
        receive_all(team.children, _START_SECONDS)
    except RuntimeError as error:
        team.fail(error)
    except BaseException:
        team.close()
        raise
    return team


def _environment(name: str, device: Device, threads: int, folder: Path) -> dict[str, str]:
    """That of a user's script, but that nothing is kept where the user would find it.

    Ours is told no more than the accelerator's size, the plan and whether to compile; peers are given what a worker is.
    """
    base = {
        **os.environ,
        "XDG_STATE_HOME": str(folder),
        "XDG_CACHE_HOME": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        # A device compiles with the core that it has; more processes would be left behind, too.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if not is_ours(name):
        return worker_environment(base, device) | {"OMP_NUM_THREADS": str(threads)}
    base.pop("MOAI_FLAVOR", None)
    return base | {"MOAI_DEVICES": str(N_DEVICES), "CUDA_VISIBLE_DEVICES": ""} | VARIANTS[name].environment
