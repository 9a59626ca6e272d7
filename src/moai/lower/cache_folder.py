"""Where everything is kept that can be made again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def home(environ: Mapping[str, str]) -> Path:
    """moai in $XDG_CACHE_HOME (~/.cache)."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moai"
