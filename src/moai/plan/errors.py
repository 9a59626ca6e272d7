"""Why a plan cannot be, and what could be instead."""

from __future__ import annotations

from moai.plan.plan import Plan


class PlanError(ValueError):
    """A plan was asked for that cannot be. `reason`: one sentence; `nearest`: a plan that can be, if one is known.

    Whoever raises it makes sure that `nearest` really can be, as far as he can tell.
    """

    def __init__(self, reason: str, nearest: Plan | None = None) -> None:
        advice = "" if nearest is None else f' The nearest plan that is possible: "{nearest}".'
        super().__init__(reason + advice)
        self.reason = reason
        self.nearest = nearest
