"""StepGraph + Plan -> Program: placements, collectives, memory. See `lowering.lower`."""

from moai.lower.cache import lower_cached
from moai.lower.lowering import lower
from moai.lower.program import Instruction, PerRank, Program, Slot

__all__ = ["Instruction", "PerRank", "Program", "Slot", "lower", "lower_cached"]
