"""`moai run`: a script on the accelerator, exactly as Python would run it.

In: a script or a module, its arguments, a plan. Out: this process becomes Python, which runs the script. So its exit
status, its signals and its command line in the list of jobs are those of `python SCRIPT ARGUMENTS`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from moai.plan.parse import VARIABLE, parse
from moai.platform import accelerators
from moai.platform.accelerators import AcceleratorError

# What makes `import torch` bring the accelerator, whatever the environment said before.
_ACTIVE = {"MOAI_CUDA": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}


def replace_process(
    script: str, arguments: Sequence[str], plan: str | None, is_module: bool, environ: Mapping[str, str]
) -> NoReturn:
    """Run `script` under `plan`, or MOAI_PLAN if that is None. AcceleratorError, in one line, where that cannot be."""
    if not is_module:
        check_script(script)
    environ = {**environ, **_ACTIVE}
    if plan is not None:
        _check_plan(plan, "--plan", environ)
        environ[VARIABLE] = plan
    elif environ.get(VARIABLE):
        _check_plan(environ[VARIABLE], VARIABLE, environ)
    os.execve(sys.executable, [sys.executable, *(["-m"] if is_module else []), script, *arguments], environ)


def check_script(script: str) -> None:
    """AcceleratorError where it cannot be run. Python's own answer comes after it has started, and names Python."""
    if not os.path.exists(script):
        raise AcceleratorError(f"{script}: there is no such file.")
    if os.path.isdir(script) and not (Path(script) / "__main__.py").is_file():
        raise AcceleratorError(f"{script} is a folder without a __main__.py.")
    if not os.access(script, os.R_OK):
        raise AcceleratorError(f"{script} cannot be read: no permission.")


def _check_plan(text: str, source: str, environ: Mapping[str, str]) -> None:
    """Refuse a plan before the script starts, and not when it first uses the device."""
    try:
        parse(text, accelerators.choose(environ).flavor.n_devices, source)
    except (ValueError, RuntimeError) as error:
        raise AcceleratorError(str(error)) from error
