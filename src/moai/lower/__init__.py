"""StepGraph + Plan -> Program: placements, collectives, memory. See `lowering.lower`."""

from typing import TYPE_CHECKING, Any

from moai.lower.program import Instruction, PerRank, Program, Slot

if TYPE_CHECKING:
    from moai.lower.cache import lower_cached
    from moai.lower.lowering import lower

__all__ = ["Instruction", "PerRank", "Program", "Slot", "lower", "lower_cached"]


def __getattr__(name: str) -> Any:
    """What makes programs is imported when it is asked for: every worker knows what a Program is, and makes none."""
    if name == "lower":
        from moai.lower.lowering import lower

        return lower
    if name == "lower_cached":
        from moai.lower.cache import lower_cached

        return lower_cached
    raise AttributeError(name)
