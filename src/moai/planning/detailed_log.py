"""The table of all candidates, for who asks for it by MOREH_ADVANCED_PARALLELIZATION_DETAILED_LOG.

In: candidates. Out: lines of the log (1), or of the file autoconfig_log.dump in the working folder (2).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from moai.plan.search import Candidate

logger = logging.getLogger("moai")

VARIABLE = "MOREH_ADVANCED_PARALLELIZATION_DETAILED_LOG"
_FILE = Path("autoconfig_log.dump")


def report(candidates: Sequence[Candidate], batch: int, environ: Mapping[str, str] = os.environ) -> None:
    """Say what was considered for a step of `batch` samples, if that is wanted."""
    wanted = environ.get(VARIABLE)
    if wanted == "1":
        for candidate in candidates:
            logger.info(_line(candidate, batch))
    elif wanted == "2":
        try:
            _FILE.write_text("".join(f"{_line(c, batch)}\n" for c in candidates), encoding="utf-8")
        except OSError as error:
            logger.warning("%s cannot be written: %s", _FILE, error)


def _line(candidate: Candidate, batch: int) -> str:
    parts = [candidate.plan.line(batch)]
    if candidate.prediction is not None:
        parts.append(f"step : {candidate.prediction.step_s * 1e3:.3f} [ms]")
        parts.append(f"memory : {candidate.prediction.memory.total / 2**20:.1f} [MiB]")
    if candidate.dropped is not None:
        parts.append(f"dropped : {candidate.dropped}")
    return ", ".join(parts)
