"""Errors whose texts are part of what the platform promises."""

from __future__ import annotations


class AcceleratorError(RuntimeError):
    """What a person asked of the platform cannot be done; the text is one clear line for them."""


class StateError(AcceleratorError):
    """The platform's database cannot be used: locked, damaged, or not writable."""


def memory_error(requested: int, available: int, other_plan: str = "") -> RuntimeError:
    """For a device that was asked for `requested` bytes and has `available`; `other_plan` is one that would fit."""
    plan_advice = f"  3. Use the plan that is nearest and fits this step: {other_plan}.\n" if other_plan else ""
    return RuntimeError(
        "Error Code 4: OUT_OF_MEMORY\n"
        "A device of the accelerator does not have the memory that this program needs.\n"
        f">> Memory requested : {requested:,} bytes\n"
        f">> Memory available : {available:,} bytes\n"
        "What can be done:\n"
        "  1. Use a bigger accelerator: more devices share the batch (MOAI_FLAVOR=NAME, or MOAI_DEVICES=N).\n"
        "  2. Use a smaller batch, or shorter sequences.\n"
        f"{plan_advice}"
        f"error dump: 4 {requested} {available}"
    )
