"""The process of a dry run: `python -m moai.dry.child FILE`.

In: FILE, with an `Order`. Out: FILE.out, with a pickled `Captured`, or a `Failure` that says why there is none.
The process ends there and then: what a script does at its end, it does not do here.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from moai.dry.messages import ModelStep, Order, read

_WATCH_SECONDS = 1.0
# Objects that are made between two collections of garbage. Imports make many that stay: by default, looking through
# them again and again takes a fifth of a dry run.
_COLLECT_AFTER = 200_000


def main(file: Path) -> NoReturn:
    gc.set_threshold(_COLLECT_AFTER)
    order = read(file.read_text())
    threading.Thread(target=_watch, args=(os.getppid(), order.seconds), daemon=True).start()
    _run(order, file)


def _run(order: Order, file: Path) -> NoReturn:
    import torch

    from moai.dry import model, script, weightless
    from moai.dry.pickling import packed
    from moai.dry.session import DrySession

    def end(result: object) -> NoReturn:
        file.with_suffix(".out").write_bytes(packed(result))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    session = DrySession(end, order.memory_bytes)
    torch.cuda.init()
    weightless.install(session.recorder)
    try:
        if isinstance(order.step, ModelStep):
            model.train(order.step, session.recorder)
        else:
            script.run(order.step[0], order.step[1:], session.recorder.flush)
    except script.Failure as failure:
        end(failure)
    raise AssertionError("a step with an optimizer ends the process")


def _watch(parent: int, seconds: float) -> None:
    """Nobody waits for longer, and nobody waits when the parent is gone."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
