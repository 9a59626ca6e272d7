"""Plans that were chosen before, on disk.

In: everything that a choice depends on. Out: what was chosen, if it was. A file for each choice, in moai/plans in
$XDG_CACHE_HOME (~/.cache), which is there whole or not at all. MOAI_PROGRAM_CACHE=0 switches this off, too. A folder
that cannot be used never stops a run: then plans are chosen anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moai.graph.placement import Placement
from moai.graph.step_graph import StepGraph
from moai.lower import cache
from moai.lower.cache_folder import home
from moai.plan.plan import Plan

logger = logging.getLogger("moai")

# A file has some hundred bytes. The ones that were not used for longest go first.
_MOST_FILES = 1000


@dataclass(frozen=True, slots=True)
class Remembered:
    """`candidates` plans were looked at, and `possible` of them were not found to be impossible. `step_s` and
    `peak_bytes`: as predicted."""

    plan: Plan
    candidates: int
    possible: int
    step_s: float
    peak_bytes: int


def key(graph: StepGraph, base: Plan, given: Sequence[Placement | None], *others: object) -> str:
    """Of a choice: the same in every process for the same step, hardware and restrictions. The code that chooses
    counts, too (as for programs: `lower.cache`)."""
    return hashlib.sha256("\n".join([cache.key(graph, base, given), *map(repr, others)]).encode()).hexdigest()


def find(name: str, environ: Mapping[str, str] = os.environ) -> Remembered | None:
    """What was chosen under this key."""
    if environ.get(cache.VARIABLE) == "0":
        return None
    file = _folder(environ) / name
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = Remembered(_plan(**content.pop("plan")), **content)
        os.utime(file)  # it is in use
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        logger.debug("The plan in %s is of no use: %s", file, error)
        return None
    return found


def _plan(layers: Sequence[int] | None, **others: Any) -> Plan:
    """JSON knows no tuples."""
    return Plan(**others, layers=None if layers is None else tuple(layers))


def keep(name: str, found: Remembered, environ: Mapping[str, str] = os.environ) -> None:
    """Keep what was chosen."""
    if environ.get(cache.VARIABLE) == "0":
        return
    folder = _folder(environ)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as written:
                json.dump(asdict(found), written)
            os.replace(temporary, folder / name)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _make_room(folder)
    except OSError as error:
        logger.debug("Plans are not kept: %s", error)


def _make_room(folder: Path) -> None:
    files = [(file.stat().st_mtime, file) for file in folder.iterdir() if not file.name.startswith(".")]
    for _, file in sorted(files)[:-_MOST_FILES]:
        file.unlink(missing_ok=True)


def _folder(environ: Mapping[str, str]) -> Path:
    return home(environ) / "plans"
