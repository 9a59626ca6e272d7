"""What a pipeline's step takes beside theory and prediction: `python -m benchmarks.pipeline`

Small models' later training steps are run on 2 and on 4 CPU workers, as so many stages, with several numbers of
micro-batches, in every order; and on one worker with the same micro-batches. Times are as in `benchmarks.regret`: by
the devices' own clocks, of each device's fastest run. Nothing is compiled. Figures by plan:

- `measured`: seconds of a step. `ideal`: those of one worker over the number of stages: no bubble, no messages.
- `over_ideal`: the first over the second; `theory`: what the schedule's bubble alone makes of it, where a stage's
  forward, gradients of inputs, and gradients of weights take equally long: for 1F1B, (m + S - 1) / m for m
  micro-batches on S stages. `uneven`: what the stages' differences make of it, too, as predicted.
- `predicted`: seconds, with what layers of the model take in their place; `error`: |predicted / measured - 1|.

More workers than cores share them: their `over_ideal` says nothing, and while one waits for others these are faster.
How long a step is beside `torch.distributed.pipelining`, `python -m benchmarks.peers --compare pipeline` says.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks import results
from benchmarks.by_model import Benchmark, run
from benchmarks.regret import Predictions, measure, profile_of
from benchmarks.steps import Script, Steps
from moai.plan.plan import Plan, Schedule
from moai.plan.prediction import Prediction, Stage
from moai.plan.profile import Profiled
from moai.plan.schedule import finish
from moai.plan.stage_cost import seconds_of_parts
from moai.plan.work import Memory
from moai.platform import clusters, pool
from moai.platform.device import Device
from moai.profiling.layers import LayerMeasurement
from moai.runtime.accelerator import Accelerator

# Micro-batches for each stage. The orders that they are run in have one stage a device, or two.
TIMES = (1, 2, 4)
SCHEDULES: tuple[Schedule, ...] = ("1f1b", "gpipe", "zero_bubble", "interleaved")
_COMMON = {"bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "gpt2": Script(
        "GPT2Config",
        {"n_embd": 256, "n_layer": 8, "n_head": 8, "n_positions": 128, "vocab_size": 1000, **_COMMON},
        batch=16,
        sequence=64,
    ),
    "llama": Script(
        "LlamaConfig",
        {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "vocab_size": 1000,
            **_COMMON,
        },
        batch=16,
        sequence=64,
    ),
}


def figures_of(steps: Steps, stages: int, quick: bool) -> list[dict[str, Any]]:
    """The figures of the module docstring of one model, by plan: two of them if it is to be `quick`."""
    counts = [stages * times for times in TIMES[: 2 if quick else None] if stages * times <= steps.script.batch]
    devices = pool.take(stages)
    alone = _alone(steps, counts, devices[0])
    cluster = clusters.of_devices(devices)
    accelerator = Accelerator(devices)
    try:
        profile = profile_of(accelerator, devices)
        tasks = LayerMeasurement(accelerator, steps.first, None).run()
        timings = Profiled(replace(profile, tasks=tasks), cluster)
        predictions = Predictions(steps, cluster)
        found: dict[Plan, Prediction] = {}
        for micro in counts:
            for schedule in SCHEDULES[: 1 if quick else None]:
                plan = Plan(pp=stages, micro=micro, schedule=schedule)
                if plan.n_stages > predictions.layers:
                    continue
                its = predictions.prediction(plan, timings)
                found[replace(plan, layers=tuple(stage.layers for stage in its.stages))] = its
        measured = measure(steps, list(found), accelerator)
    finally:
        accelerator.close()
    return [_of_plan(plan, found[plan], seconds, alone[plan.micro]) for plan, seconds in measured.items()]


def _alone(steps: Steps, counts: Sequence[int], device: Device) -> dict[int, float]:
    """Seconds on one worker, with as many threads as each of several has, by number of micro-batches."""
    accelerator = Accelerator((device,))
    try:
        found = measure(steps, [Plan(micro=micro) for micro in counts], accelerator)
    finally:
        accelerator.close()
    return {plan.micro: seconds for plan, seconds in found.items()}


def _of_plan(plan: Plan, predicted: Prediction, measured: float, alone: float) -> dict[str, Any]:
    ideal = alone / plan.pp
    stages = [predicted.stages[device :: plan.pp] for device in range(plan.pp)]
    seconds = [seconds_of_parts(own, plan.schedule) for own in stages]
    turns = finish(plan.schedule, plan.micro, seconds, 0.0, plan.n_stages // plan.pp)
    return {
        "plan": str(plan),
        "measured": measured,
        "ideal": ideal,
        "over_ideal": measured / ideal,
        "theory": theory(plan),
        "uneven": turns / (plan.micro * statistics.mean(map(sum, seconds))),
        "predicted": predicted.step_s,
        "error": abs(predicted.step_s / measured - 1),
    }


def theory(plan: Plan) -> float:
    """What the schedule's bubble makes of a step of equal stages."""
    chunks = plan.n_stages // plan.pp
    its = Stage(1, 1.0 / chunks, 2.0 / chunks, 1.0 / chunks, 0.0, Memory())
    seconds = [seconds_of_parts([its] * chunks, plan.schedule)] * plan.pp
    return finish(plan.schedule, plan.micro, seconds, 0.0, chunks) / (plan.micro * 3.0)


def table(figures: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The figures as Markdown, and the mean error of all of them."""
    rows = [
        [
            name,
            each["plan"],
            f"{each['measured'] * 1e3:.1f}",
            *(f"{each[k]:.2f}" for k in _RATIOS),
            f"{each['error']:.0%}",
        ]
        for name, plans in figures.items()
        for each in plans
    ]
    head = [
        "model, workers",
        "plan",
        "step, ms",
        "over the ideal",
        "theory",
        "with uneven stages",
        "error of the prediction",
    ]
    errors = [each["error"] for plans in figures.values() for each in plans]
    return f"{results.markdown(head, rows)}\n\nMean error of the predicted step: {statistics.mean(errors):.1%}."


_RATIOS = ("over_ideal", "theory", "uneven")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    benchmark = Benchmark(
        "pipeline",
        "A pipeline's step beside theory and prediction.",
        MODELS,
        ("--stages", "stages", "2,4"),
        "two plans of each",
        figures_of,
        lambda found: f"{table(found)} ",
    )
    run(benchmark, arguments)


if __name__ == "__main__":
    main()
