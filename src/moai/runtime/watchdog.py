"""Watchdog: tells workers that are slow from workers that are stuck. Pure: time comes in with every call.

In: when a worker was heard, its pulses, and who is expected to be at work. Out: a verdict in words, or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moai.platform.device import Device
from moai.runtime.messages import Pulse

SILENCE_SECONDS = 15.0  # a living worker sends a pulse a second, whatever it computes
# A CPU worker without CPU time is stuck; kernels on a GPU may run long without any.
STALL_SECONDS = {"cpu": 20.0, "cuda": 300.0}
_CPU_NOISE_SECONDS = 0.01
_OWN_PAUSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Device `rank` is to blame, because it `text` ("has ...")."""

    rank: int
    text: str


@dataclass(slots=True)
class _Vitals:
    heard: float
    progressed: float
    pulse: Pulse | None = None


class Watchdog:
    """See the module docstring. All times are seconds of one monotonic clock."""

    def __init__(self, devices: Sequence[Device], now: float) -> None:
        self._devices = tuple(devices)
        self._vitals = [_Vitals(now, now) for _ in devices]
        self._last_look = now

    def heard(self, rank: int, now: float) -> None:
        """Something came from worker `rank`."""
        self._vitals[rank].heard = now

    def pulse(self, rank: int, pulse: Pulse, now: float) -> None:
        """Worker `rank` has reported."""
        vitals = self._vitals[rank]
        last = vitals.pulse
        if (
            last is None
            or pulse.executed != last.executed
            or pulse.doing != last.doing
            or pulse.cpu_seconds > last.cpu_seconds + _CPU_NOISE_SECONDS
        ):
            vitals.progressed = now
            vitals.pulse = pulse

    def doing(self, rank: int) -> str:
        """What worker `rank` was last seen at, to follow its name in a sentence; "" if it is not known."""
        pulse = self._vitals[rank].pulse
        return f", last seen in {pulse.doing}" if pulse and pulse.doing else ""

    def verdict(self, at_work: Sequence[bool], now: float) -> Verdict | None:
        """Who is stuck, of those who have something to do. To be called about once a second."""
        paused = now - self._last_look > _OWN_PAUSE_SECONDS
        self._last_look = now
        for vitals, working in zip(self._vitals, at_work, strict=True):
            if paused or not working:
                vitals.heard = vitals.progressed = now
        return self._silent(now) or self._stalled([r for r, working in enumerate(at_work) if working], now)

    def _silent(self, now: float) -> Verdict | None:
        for rank, vitals in enumerate(self._vitals):
            if now - vitals.heard > SILENCE_SECONDS:
                text = f"has given no sign of life for {SILENCE_SECONDS:.0f} s{self.doing(rank)}: stopped, or cut off?"
                return Verdict(rank, text)
        return None

    def _stalled(self, at_work: Sequence[int], now: float) -> Verdict | None:
        stuck = [r for r in at_work if now - self._vitals[r].progressed > STALL_SECONDS[self._devices[r].kind]]
        for rank in stuck:
            pulse = self._vitals[rank].pulse
            if pulse is None or not pulse.in_collective:
                return Verdict(rank, f"has made no progress for {self._stall(rank)} s{self.doing(rank)}")
        if stuck and len(stuck) == len(at_work):
            places = "; ".join(f"device {r}{self.doing(r)}" for r in stuck)
            return Verdict(
                stuck[0], f"and all others at work wait for each other for {self._stall(stuck[0])} s: {places}"
            )
        return None

    def _stall(self, rank: int) -> str:
        return f"{STALL_SECONDS[self._devices[rank].kind]:.0f}"
