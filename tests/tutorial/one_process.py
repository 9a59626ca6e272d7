"""Runs scripts of the tutorial in one process, one after another: first without the accelerator, then all with it.

In: a folder, and as JSON a list of [run, script, arguments]; each runs in its `plain/<run>` or `devices/<run>`.
Out: what they print, behind lines that say which it is. Starting a program takes longer than these runs do.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch

from tests.tutorial.scripts import ROOT


def main() -> None:
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.path.insert(0, str(ROOT / "tutorial"))
    accelerator = torch.cuda.is_available
    for where, is_available in (("plain", lambda: False), ("devices", accelerator)):
        torch.cuda.is_available = is_available
        for run, script, arguments in runs:
            (folder / where / run).mkdir(parents=True, exist_ok=True)
            os.chdir(folder / where / run)
            sys.argv = [script, *arguments]
            for stream in (sys.stdout, sys.stderr):
                print(f"\n=== {where} {run} {script}", file=stream, flush=True)
            runpy.run_path(str(ROOT / "tutorial" / script), run_name="__main__")


if __name__ == "__main__":
    main()
