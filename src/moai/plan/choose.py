"""Which plan a process runs.

In: the text of MOAI_PLAN, the script's options, the accelerator. Out: a `ChosenPlan`. MOAI_PLAN wins; without either
the batch is shared by all devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moai.plan.options import Options
from moai.plan.parse import VARIABLE, parse
from moai.plan.plan import Plan

_OPTIONS = "torch.moreh.option"


@dataclass(frozen=True, slots=True)
class ChosenPlan:
    """A plan. `origin`: who asked for it, in words for an error; `asked_for`: whether anybody did; `notes`: lines that
    the log should have beside the plan."""

    plan: Plan
    origin: str
    asked_for: bool
    notes: tuple[str, ...] = ()


def choose(
    n_devices: int, forced: str | None, options: Options | None, bf16_is_faster: Callable[[], bool]
) -> ChosenPlan:
    """The plan for an accelerator of `n_devices` devices; `forced` is the value of MOAI_PLAN, None where it is not set.

    `bf16_is_faster` says whether the devices compute matrix products faster in bf16 than in fp32.

    Raises PlanError for a forced plan that cannot be.
    """
    if forced is not None:
        plan = parse(forced, n_devices)
        notes = () if options is None else _ignored(plan, options, bf16_is_faster)
        return ChosenPlan(plan, f'{VARIABLE}="{forced}"', True, notes)
    if options is None:
        plan = Plan(dp=n_devices)
        return ChosenPlan(plan, f'The plan "{plan}"', False)
    plan = _of_options(options, n_devices, bf16_is_faster)
    return ChosenPlan(plan, f'The plan "{plan}" of {_OPTIONS}', True, _on_precision(plan, options))


def _of_options(options: Options, n_devices: int, bf16_is_faster: Callable[[], bool]) -> Plan:
    """'auto' is Plan's default. Recomputation without a level is all of it, the one that surely saves memory; there are
    no stages yet, which every number of stages allows, since it is the largest."""
    return Plan(
        dp=n_devices,
        micro=1 if options.num_micro_batches == "auto" else options.num_micro_batches,
        recompute="full" if options.activation_recomputation is True else "none",
        distribute_param=options.distribute_parameter is True,
        precision="bf16" if options.mixed_precision and bf16_is_faster() else None,
    )


def _on_precision(plan: Plan, options: Options) -> tuple[str, ...]:
    if plan.precision == "bf16":
        return ("Products of fp32 matrices are computed in bf16 (mixed_precision=True). Weights stay in fp32.",)
    if options.mixed_precision:
        return ("mixed_precision has no effect: these devices do not compute faster in bf16 than in fp32.",)
    return ()


def _ignored(plan: Plan, options: Options, bf16_is_faster: Callable[[], bool]) -> tuple[str, ...]:
    """One line that names the options which say something else than the forced `plan`."""
    wanted = _of_options(options, plan.n_devices, bf16_is_faster)
    said = {
        "num_micro_batches": options.num_micro_batches != "auto" and wanted.micro != plan.micro,
        "activation_recomputation": options.activation_recomputation != "auto"
        and (wanted.recompute == "none") != (plan.recompute == "none"),
        "distribute_parameter": options.distribute_parameter != "auto"
        and wanted.distribute_param != plan.distribute_param,
        "mixed_precision": (wanted.precision == "bf16") != (plan.precision == "bf16"),
    }
    names = [f"{name}={getattr(options, name)}" for name, contradicts in said.items() if contradicts]
    return (f"{VARIABLE} is followed, and not what the script asks for: {', '.join(names)}.",) if names else ()
