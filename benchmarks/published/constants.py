"""The calibrated constants of the cluster files.

In: what `calibrate` found. Out: the `[constants]` at the end of each file of moai/plan/clusters, and their sources.
Hardware of which there are no rows has those of hardware of the same kind, as an assumption.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from moai.plan.cluster import Constant
from moai.plan.cluster_file import SHIPPED, SUFFIX, load, names
from moai.plan.timings import GENERIC

Constants = Mapping[str, Constant]

# Whose constants are the nearest: the same chip, with other memory or another clock.
KIN = {
    "a100-40": "a100-80",
    "a100-80": "a100-40",
    "b200": "gb200",
    "gb200": "b200",
    "h100": "h100-96",
    "h100-96": "h100",
    "h200": "h100",
    "v100-16": "v100-32",
    "v100-32": "v100-16",
}
_BEST = "0.9 of the best of stas00/ml-engineering, compute/accelerator/README.md"
_DAO = "Dao, FlashAttention-2 (2023), figures 4 to 6: 180 to 225 TFLOP/s forward and backward, of 312"


def _measured(value: float, source: str) -> Constant:
    return Constant(value, "measured", 0.1, 1.0, source)


# What was measured by other means than training: where calibration begins.
MEASURED: dict[str, dict[str, Constant]] = {
    "a100-40": {"matmul": _measured(0.78, _BEST), "attention": _measured(0.6, _DAO)},
    "a100-80": {"matmul": _measured(0.78, _BEST), "attention": _measured(0.6, _DAO)},
    "h100": {"matmul": _measured(0.72, _BEST), "matmul_fp8": _measured(0.64, _BEST)},
    "h200": {"matmul": _measured(0.72, _BEST), "matmul_fp8": _measured(0.66, _BEST)},
    "b200": {"matmul": _measured(0.70, _BEST), "matmul_fp8": _measured(0.69, _BEST)},
    "mi300x": {"matmul": _measured(0.46, _BEST)},
}
_HEAD = "\n# Fitted to published runs by `python -m benchmarks.published --fit`: change them there.\n[constants]\n"
_FITTED = "rows of "


def shipped(hardware: str) -> Constants:
    return load(hardware).constants


def fitted_to(constants: Constants) -> set[str]:
    """The sources whose rows any of the constants was fitted to."""
    texts = [c.source for c in constants.values() if c.source.startswith(_FITTED)]
    return {source for text in texts for source in text.removeprefix(_FITTED).split(", ")}


def with_sources(constants: Constants, sources: set[str]) -> Constants:
    """The fitted ones say what they were fitted to."""
    text = _FITTED + ", ".join(sorted(sources))
    return {name: replace(c, source=text) if c.provenance == "fitted" else c for name, c in constants.items()}


def prior(hardware: str, kin: Constants) -> dict[str, Constant]:
    """Where the calibration of some hardware begins: `kin` are the constants of hardware of the same kind."""
    return {**GENERIC, **MEASURED.get(hardware, {}), **kin}


def write(fitted: Mapping[str, Constants]) -> None:
    """Replace the constants of all cluster files of hardware that was fitted, is of a kind with it, or was measured."""
    for name in names():
        constants = fitted.get(name) or _assumed(fitted, name) or MEASURED.get(name, {})
        if not constants:
            continue
        file = SHIPPED / f"{name}{SUFFIX}"
        text = file.read_text(encoding="utf-8").split(_HEAD)[0]
        lines = [_line(key, c) for key, c in sorted(constants.items())]
        file.write_text(text + _HEAD + "".join(lines), encoding="utf-8")


def _assumed(fitted: Mapping[str, Constants], name: str) -> Constants:
    kin = KIN.get(name, "")
    found = fitted.get(kin, {})
    return {key: replace(c, provenance="assumed", source=f"as of {kin}") for key, c in found.items()}


def _line(key: str, constant: Constant) -> str:
    figures = ", ".join(f"{f} = {_number(getattr(constant, f))}" for f in ("value", "low", "high"))
    return f'{key} = {{ {figures}, provenance = "{constant.provenance}", source = "{constant.source}" }}\n'


def _number(value: float) -> str:
    return re.sub(r"e-0*", "e-", f"{value:.3g}")
