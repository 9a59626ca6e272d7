"""Which plan a process runs.

In: the text of MOAI_PLAN, the script's options, the accelerator. Out: a `ChosenPlan`. MOAI_PLAN wins; options have a
plan searched for when the first training step is known; without either the batch is shared by all devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moai.plan.options import Options
from moai.plan.parse import VARIABLE, parse
from moai.plan.plan import Plan, Precision
from moai.plan.space import Allowed

_OPTIONS = "torch.moreh.option"


@dataclass(frozen=True, slots=True)
class ChosenPlan:
    """A plan. `origin`: who asked for it, in words for an error; `asked_for`: whether anybody did; `notes`: lines that
    the log should have beside the plan; `warning`: what will be slow about it; `allowed`: what the script leaves to a
    search, until whose end `plan` holds."""

    plan: Plan
    origin: str
    asked_for: bool
    notes: tuple[str, ...] = ()
    allowed: Allowed | None = None
    warning: str = ""


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
        return ChosenPlan(plan, f'{VARIABLE}="{forced}"', True, notes, warning=_waiting(plan))
    plan = Plan(dp=n_devices, precision=_precision(options, bf16_is_faster))
    if options is None:
        return ChosenPlan(plan, f'The plan "{plan}"', False)
    notes = _on_precision(plan, options)
    return ChosenPlan(plan, f'The plan "{plan}" of {_OPTIONS}', False, notes, Allowed.by(options))


def _precision(options: Options | None, bf16_is_faster: Callable[[], bool]) -> Precision | None:
    return "bf16" if options is not None and options.mixed_precision and bf16_is_faster() else None


def _waiting(plan: Plan) -> str:
    if plan.micro >= plan.pp:
        return ""
    return f"There are fewer micro-batches ({plan.micro}) than stages ({plan.pp}): some stages always wait for others."


def _on_precision(plan: Plan, options: Options) -> tuple[str, ...]:
    if plan.precision == "bf16":
        return ("Products of fp32 matrices are computed in bf16 (mixed_precision=True). Weights stay in fp32.",)
    if options.mixed_precision:
        return ("mixed_precision has no effect: these devices do not compute faster in bf16 than in fp32.",)
    return ()


def _ignored(plan: Plan, options: Options, bf16_is_faster: Callable[[], bool]) -> tuple[str, ...]:
    """One line that names the options which say something else than the forced `plan`."""
    again, spread, micro = options.activation_recomputation, options.distribute_parameter, options.num_micro_batches
    said = {
        "num_micro_batches": micro not in ("auto", plan.micro),
        "activation_recomputation": again not in ("auto", plan.recompute != "none"),
        "distribute_parameter": spread not in ("auto", plan.distribute_param),
        "pipeline_parallel": not options.pipeline_parallel and plan.pp > 1,
        "num_stages": options.num_stages != "auto" and plan.pp > options.num_stages,
        "mixed_precision": (_precision(options, bf16_is_faster) == "bf16") != (plan.precision == "bf16"),
    }
    names = [f"{name}={getattr(options, name)}" for name, contradicts in said.items() if contradicts]
    return (f"{VARIABLE} is followed, and not what the script asks for: {', '.join(names)}.",) if names else ()
