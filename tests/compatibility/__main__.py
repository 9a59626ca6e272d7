"""Which scripts run unmodified, and with whose numbers?

    python -m tests.compatibility                        # every script, on 1, 2 and 4 devices and under a chosen plan
    python -m tests.compatibility nanogpt vit --on 2 4   # some of them
    python -m tests.compatibility --record               # and write what was found into docs/compatibility.md

Ends with status 1 if a script fails or its numbers differ from plain PyTorch's by more than its bound.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from tests.compatibility.cases import ALL, FP32, HALF, Case
from tests.compatibility.run import CHOSEN, SETTINGS, difference, plain, run

FILE = Path(__file__).parents[2] / "docs" / "compatibility.md"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "diffusers", "datasets")
# What follows the line with this text is written by hand, and kept.
BY_HAND = "## What does not run, and what to say instead"

HEAD = """# Compatibility

Scripts for one GPU, as people write them, run unmodified; what they print is held against the same script under plain
PyTorch on the CPU. A cell is the largest relative difference of all printed numbers (losses, norms, accuracies, sums of
weights), beyond their last printed digit. The scripts are in
[tests/compatibility/scripts](../tests/compatibility/scripts); the table is made by
`python -m tests.compatibility --record`. Bounds: {fp32:g} in fp32, {half:g} in 16 bits (amp). **Bold** is beyond its
bound, or a failure. A column is a number of devices; "chosen" is four under the plan that the planner chose.

{provenance}

"""


def cell(case: Case, setting: str) -> tuple[str, bool]:
    """A table's cell, and whether it is as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        done = run(case, setting, Path(folder))
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return "**fails**", False
    found = difference(done.stdout, plain(case))
    text = "same" if found == 0 else f"{found:.0e}"
    return (text, True) if found <= case.bound else (f"**{text}**", False)


def line(case: Case, cells: Mapping[str, str]) -> str:
    """A row of the table."""
    return f"| {case.name} | {case.what} | {' | '.join(cells.values())} |"


def recorded(text: str) -> dict[str, dict[str, str]]:
    """The cells of a table by script and setting."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    titles = next((row for row in rows if row[0] == "script"), [])
    return {row[0]: dict(zip(titles[2:], row[2:], strict=True)) for row in rows if len(row) == len(titles)}


def provenance() -> str:
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{datetime.now(timezone.utc):%Y-%m-%d}, CPU workers. {', '.join(versions)}."


def record(found: Mapping[str, Mapping[str, str]]) -> None:
    """Writes what was found into the table, whose other cells stay."""
    table, _, kept = FILE.read_text().partition(BY_HAND) if FILE.exists() else ("", "", "\n")
    before = recorded(table)
    titles = f"| script | what it does | {' | '.join(SETTINGS)} |\n|{'---|' * (len(SETTINGS) + 2)}\n"
    rows = []
    for case in ALL:
        known = {**before.get(case.name, {}), **found.get(case.name, {})}
        rows.append(line(case, {setting: known.get(setting, "not run") for setting in SETTINGS}))
    head = HEAD.format(fp32=FP32, half=HALF, provenance=provenance())
    FILE.write_text(head + titles + "\n".join(rows) + f"\n\n{BY_HAND}{kept}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.compatibility", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", choices=[[], *(c.name for c in ALL)], metavar="SCRIPT")
    parser.add_argument("--on", nargs="+", choices=SETTINGS, default=SETTINGS, help=f"devices, or {CHOSEN}")
    parser.add_argument("--record", action="store_true", help="write docs/compatibility.md")
    arguments = parser.parse_args()
    well = True
    for case in ALL:
        if not arguments.scripts or case.name in arguments.scripts:
            cells = {}
            for setting in arguments.on:
                cells[setting], ok = (f"without {case.missing[0]}", True) if case.missing else cell(case, setting)
                well &= ok
            print(line(case, cells), flush=True)
            if arguments.record:
                record({case.name: cells})
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
