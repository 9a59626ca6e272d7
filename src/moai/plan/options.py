"""The options of `torch.moreh.option.enable_advanced_parallelization`.

In: its arguments. Out: a frozen `Options`, or ValueError and TypeError saying what is allowed. Each option that is
not "auto" restricts which plans may be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Auto = Literal["auto"]


@dataclass(frozen=True, slots=True)
class Options:
    """What the script allows.

    pipeline_parallel: whether the model may be cut into stages.
    num_stages: the largest number of stages.
    num_micro_batches: the number of parts that a batch is cut into.
    activation_recomputation: whether activations are computed again in the backward pass instead of kept.
    distribute_parameter: whether parameters and gradients are spread over the devices.
    mixed_precision: whether matrix products are computed in bfloat16.
    """

    pipeline_parallel: bool = True
    num_stages: int | Auto = "auto"
    num_micro_batches: int | Auto = "auto"
    activation_recomputation: bool | Auto = "auto"
    distribute_parameter: bool | Auto = "auto"
    mixed_precision: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            check = _CHECKS[field.name]
            check(field.name, getattr(self, field.name))
        if not self.pipeline_parallel and self.num_stages not in ("auto", 1):
            raise ValueError(
                f"num_stages={self.num_stages} contradicts pipeline_parallel=False: without a pipeline there is one "
                "stage. Leave num_stages at 'auto' or set pipeline_parallel=True."
            )


def _bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}.")


def _bool_or_auto(name: str, value: object) -> None:
    if isinstance(value, bool) or value == "auto":
        return
    raise _wrong(value, f"{name} must be True, False or 'auto', not {value!r}.")


def _count_or_auto(name: str, value: object) -> None:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    is_count = isinstance(value, int) and not isinstance(value, bool)
    message = f"{name} must be a whole number, 1 or more, or 'auto', not {value!r}."
    raise ValueError(message) if is_count else _wrong(value, message)


def _wrong(value: object, message: str) -> Exception:
    """A string could have been 'auto', so another string is a wrong value; anything else is of a wrong type."""
    return ValueError(message) if isinstance(value, str) else TypeError(message)


_CHECKS = {
    "pipeline_parallel": _bool,
    "num_stages": _count_or_auto,
    "num_micro_batches": _count_or_auto,
    "activation_recomputation": _bool_or_auto,
    "distribute_parameter": _bool_or_auto,
    "mixed_precision": _bool,
}
