"""Fifty programs at once that add, switch, remove and read accelerators.

`python -m tests.platform.crowd SECONDS [--kill]` prints one JSON line with what they did. With --kill, one of them is
killed every few milliseconds, and replaced.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from moai.platform import accelerators, flavors
from moai.platform.accelerators import AcceleratorError
from moai.platform.errors import StateError
from moai.platform.pool import GB, Machine

PROGRAMS = 50
FLAVORS = flavors.available(Machine(cores=2, memory_bytes=23 * GB))


class Program:
    """One of the crowd. It notes what it is about to do, then what it has done: a killed one can say only the first."""

    def __init__(self, log: Path, deadline: float) -> None:
        self._log = log
        self._deadline = deadline
        self._random = random.Random(str(log))

    def run(self) -> None:
        with open(self._log, "a", buffering=1) as log:
            while time.monotonic() < self._deadline:
                try:
                    self._act(lambda *words: print(*words, file=log))
                except StateError as error:
                    print("error", str(error).replace("\n", " "), file=log)
                except AcceleratorError:  # too many, too few, or gone by now
                    print("refused", file=log)
                except Exception:
                    print("error", traceback.format_exc().replace("\n", " "), file=log)

    def _act(self, note) -> None:
        action = self._random.choice(["add", "remove", "remove", "switch", "set_flavor", "read", "read"])
        present = accelerators.accelerators()
        chosen = self._random.choice(present).id
        if action == "add":
            note("added", accelerators.add(self._random.choice(FLAVORS)).id)
        elif action == "remove":
            note("removing", chosen)
            accelerators.remove(chosen)
            note("removed", chosen)
        elif action == "switch":
            accelerators.switch(chosen)
            note("switched")
        elif action == "set_flavor":
            accelerators.set_flavor(self._random.choice(FLAVORS))
            note("set")
        else:
            assert sum(a.is_default for a in present) == 1
            note("read")


def start(program: Program) -> int:
    """The pid of a process that runs it."""
    pid = os.fork()
    if pid == 0:
        program.run()
        os._exit(0)
    return pid


def main(seconds: float, kill: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), seconds, kill)


def run(folder: Path, seconds: float, kill: bool) -> None:
    deadline = time.monotonic() + seconds
    count = 0

    def another() -> int:
        nonlocal count
        count += 1
        return start(Program(folder / str(count), deadline))

    pids = [another() for _ in range(PROGRAMS)]
    while kill and time.monotonic() < deadline:
        victim = random.randrange(PROGRAMS)
        os.kill(pids[victim], signal.SIGKILL)
        os.waitpid(pids[victim], 0)
        pids[victim] = another()
        time.sleep(random.uniform(0, 0.02))
    for pid in pids:
        os.waitpid(pid, 0)
    lines = [line for file in folder.iterdir() for line in file.read_text().splitlines()]
    said = {word: [line.partition(" ")[2] for line in lines if line.startswith(word + " ")] for word in WORDS}
    numbers = {word: sorted(int(n) for n in said[word]) for word in WORDS if word != "error"}
    print(json.dumps({**numbers, "error": said["error"], "programs": count, "actions": len(lines)}))


WORDS = ("added", "removing", "removed", "error")

if __name__ == "__main__":
    main(float(sys.argv[1]), "--kill" in sys.argv)
