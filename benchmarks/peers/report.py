"""What teams did, in figures and as Markdown.

Figures, by variant: `step_s`, seconds a step; `cpu_s`, CPU seconds a step of all its processes, which other programs
disturb less; both with their quartiles over the rounds. `start_s`, seconds that the first steps took beyond what later
ones do: capture, compilation, warm-up. `peak_bytes`, the peak of a process that computes, its libraries and its
compiler included. `loss`, that of the last step, and `loss_error`, its largest difference from the exact loss over all
blocks; exact is one process on the whole batch. A data-parallel peer's loss is the mean over its ranks.

`ratios`: by variant of ours, then by peer, step time of the first over the second, each round by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import results
from benchmarks.peers.teams import WARM_UP_ROUNDS, Team
from benchmarks.peers.variants import EXACT, is_ours


def summarize(teams: Mapping[str, Team], steps: int) -> dict[str, Any]:
    """The figures of the module docstring, and `failures`: the reasons of those that failed, by variant.

    RuntimeError if the training that others are compared with failed.
    """
    if teams[EXACT].failure is not None:
        raise RuntimeError(f"nothing to compare with: {teams[EXACT].failure}")
    ran = {name: team for name, team in teams.items() if team.failure is None}
    timed = {name: team.step_s[WARM_UP_ROUNDS:] for name, team in ran.items()}
    return {
        "variants": {name: _of_variant(team, teams[EXACT].losses, steps) for name, team in ran.items()},
        "ratios": {ours: _ratios(timed, ours) for ours in timed if is_ours(ours)},
        "failures": {name: team.failure for name, team in teams.items() if team.failure is not None},
    }


def _of_variant(team: Team, exact: Sequence[float], steps: int) -> dict[str, Any]:
    return {
        "step_s": results.quartiles(team.step_s[WARM_UP_ROUNDS:]),
        "cpu_s": results.quartiles(team.cpu_s[WARM_UP_ROUNDS:]),
        "start_s": team.start_s(steps),
        "peak_bytes": team.peak_bytes,
        "loss": team.losses[-1],
        "loss_error": max(abs(a - b) for a, b in zip(team.losses, exact, strict=True)),
    }


def _ratios(timed: Mapping[str, Sequence[float]], ours: str) -> dict[str, Any]:
    peers = {name: times for name, times in timed.items() if not is_ours(name)}
    return {
        name: results.quartiles(mine / theirs for mine, theirs in zip(timed[ours], times, strict=True))
        for name, times in peers.items()
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown: a table of the variants, one of ratios, and a line for each failure."""
    text = results.markdown(
        ("", "step, ms: median (q25-q75)", "CPU, ms", "start, s", "peak, MiB", "loss", "loss error"),
        [_variant_cells(name, each) for name, each in figures["variants"].items()],
    )
    ratios = figures["ratios"]
    if ratios:
        peers = [name for name in figures["variants"] if not is_ours(name)]
        rows = [[f"/ {name}", *(results.spread(ratios[ours][name]) for ours in ratios)] for name in peers]
        text += "\n\n" + results.markdown(("step time of", *ratios), rows)
    for name, reason in figures["failures"].items():
        text += f"\n\n{name} failed: {reason.strip().splitlines()[-1]}"
    return f"{text}\n\nOther programs took {figures['others_cpu']:.0%} of the machine's time."


def _variant_cells(name: str, figures: Mapping[str, Any]) -> list[str]:
    return [
        name,
        results.spread(figures["step_s"], 1e3, digits=1),
        f"{figures['cpu_s']['median'] * 1e3:.0f}",
        f"{figures['start_s']:.1f}",
        f"{figures['peak_bytes'] / 2**20:.0f}",
        f"{figures['loss']:.5f}",
        "exact" if name == EXACT else f"{figures['loss_error']:.1e}",
    ]
