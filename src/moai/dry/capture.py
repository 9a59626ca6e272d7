"""Captures a training step without running it.

In: a script with its arguments, or a model's config and a batch. Out: a `Captured`: the step's graph. A process of its
own runs the script up to its first training step, on tensors without data: it needs no devices, reads no weights, and
takes seconds whatever the model's size. The script's data are its own, and it has to find them.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moai.dry.messages import ModelStep, Order
from moai.platform.errors import AcceleratorError

if TYPE_CHECKING:
    from moai.dry.script import Failure
    from moai.dry.session import Captured

# A dry run has its own accelerator, whatever the environment says; and it is no experiment to be written down.
_ENVIRONMENT = {"MOAI_CUDA": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1", "WANDB_MODE": "disabled"}
_TAIL_BYTES = 4096
_GRACE_SECONDS = 5.0


class CaptureError(AcceleratorError):
    """There is no training step to plan; the text is one line for a person."""


def capture_script(
    script: str, arguments: Sequence[str], memory_bytes: int, seconds: float, verbose: bool = False
) -> Captured:
    """The first training step of `python script arguments`. `memory_bytes`: of the accelerator that the script sees.
    `verbose`: what the script prints goes to stderr. Raises CaptureError."""
    order = Order((script, *arguments), memory_bytes, seconds)
    return _run(order, os.path.basename(script), verbose)


def capture_model(step: ModelStep, memory_bytes: int, seconds: float, verbose: bool = False) -> Captured:
    """The training step of a model that is known by its config. Raises CaptureError."""
    return _run(Order(step, memory_bytes, seconds), step.model, verbose)


def _run(order: Order, name: str, verbose: bool) -> Captured:
    with tempfile.TemporaryDirectory(prefix="moai-plan-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "order"
        file.write_text(order.text())
        with (Path(folder) / "output").open("w+b") as output:
            process = _start(file, sys.stderr.fileno() if verbose else output.fileno(), os.environ)
            try:
                _prepare()  # while the other process does the same
                status = _wait(process, order.seconds, name)
            finally:
                _end(process)
            result = file.with_suffix(".out")
            if not result.exists():
                text = f"{name} ended before its first training step, with exit status {status}"
                raise _unexplained(text, output.fileno())
            return _captured(pickle.loads(result.read_bytes()), output.fileno())


def _prepare() -> None:
    """Imports what planning will need: torch, and what its operators ask for when first used without data."""
    import torch._dynamo  # noqa: F401

    import moai.lower.sampling  # noqa: F401


def _captured(found: Captured | Failure, output: int) -> Captured:
    from moai.dry.session import Captured

    if isinstance(found, Captured):
        return found
    if not found.explained:
        raise _unexplained(found.text, output)
    raise CaptureError(f"{found.text.removesuffix('.')}.")


def _unexplained(text: str, output: int) -> CaptureError:
    """For an end that gives no reason: what was printed last may."""
    last = _last_line(output)
    return CaptureError(f"{text}.{' The last line that it printed: ' if last else ''}{last}")


def _start(file: Path, output: int, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    environment = {**environ, **_ENVIRONMENT, "TMPDIR": str(file.parent)}
    environment.pop("MOAI_PLAN", None)
    command = [sys.executable, "-m", "moai.dry.child", str(file)]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )


def _wait(process: subprocess.Popen[bytes], seconds: float, name: str) -> int:
    """The exit status."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise CaptureError(
            f"{name} took no training step within {seconds:.0f} s. If it needs longer to load its data, give it more: "
            "--timeout SECONDS."
        ) from None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of the process is left, nor of its data loaders."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(_GRACE_SECONDS)


def _last_line(output: int) -> str:
    size = os.fstat(output).st_size
    os.lseek(output, max(0, size - _TAIL_BYTES), os.SEEK_SET)
    lines = os.read(output, _TAIL_BYTES).decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
