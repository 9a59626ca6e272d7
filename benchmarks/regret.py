"""Does the planner choose the best plan of this machine? `python -m benchmarks.regret`

Small models' training steps are run under every plan that there is for 1, 2 and 4 CPU workers (fewer with --devices),
and each is predicted: with what layers of the model take in their place ("layers"), with the general profile of these
workers ("profiled"; it is measured first where there is none) and with the description of a CPU alone ("described"). A
step's time is that of later steps, whose optimizer has its states, by the devices' own clocks: of each device's fastest
run. Nothing is compiled. Figures by model and number of devices:

- `plans`: of each plan its text, the seconds `measured`, and those predicted.
- `chosen`, `regret`: what the planner takes, and its measured time over that of the fastest plan.
  What `regret` sums up to over models, less 1 each, says what a way to predict is worth.
- `rank`: Spearman's correlation of predicted and measured times; `error`: the mean of |predicted / measured - 1|;
  `bias`: the median of predicted / measured.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.by_model import Benchmark, run
from benchmarks.steps import Script, Steps, made_up
from moai.lower import lower
from moai.lower.inputs import global_batch
from moai.lower.sampling import layers, observe
from moai.plan.cluster import Cluster
from moai.plan.cost import predict
from moai.plan.errors import PlanError
from moai.plan.plan import Plan
from moai.plan.prediction import Prediction
from moai.plan.profile import Profile, Profiled
from moai.plan.search import Step, search
from moai.plan.space import Allowed, plans
from moai.plan.timings import Described, Timings, groups
from moai.platform import clusters, pool
from moai.platform.device import Device
from moai.profiling import store
from moai.profiling.layers import LayerMeasurement
from moai.profiling.measuring import STANDARD, Measurement
from moai.profiling.stopwatch import Stopwatch
from moai.runtime.accelerator import Accelerator

# All plans take their turns so many times, which are far apart: what disturbs one turn spares the other.
ROUNDS = 4
_RUNS = 8
HOW = ("layers", "profiled", "described")
_ALL, _ALL_MEMORY = Allowed(), 1 << 50
_COMMON = {"bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "gpt2": Script(
        "GPT2Config",
        {"n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 128, "vocab_size": 1000, **_COMMON},
        batch=4,
        sequence=128,
    ),
    "llama": Script(
        "LlamaConfig",
        {
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 2000,
            **_COMMON,
        },
        batch=4,
        sequence=128,
    ),
    "wide": Script(
        "Qwen2Config",
        {
            "hidden_size": 640,
            "intermediate_size": 1920,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": 1000,
            "tie_word_embeddings": True,
            **_COMMON,
        },
        batch=4,
        sequence=64,
    ),
}


class Predictions:
    """What the planner makes of a step on a cluster. A plan is observed once, whatever is asked."""

    def __init__(self, steps: Steps, cluster: Cluster) -> None:
        graph = steps.first
        self._cluster = cluster
        self.layers = layers(graph)
        self.batch = global_batch(graph, [None] * len(graph.inputs))
        self._step = Step(cache(lambda plan: observe(graph, plan)), self.batch, layers=self.layers)

    def best(self, timings: Timings, allowed: Allowed = _ALL, budget: int = _ALL_MEMORY) -> tuple[Plan, float]:
        """The plan that is chosen, and its predicted seconds. Raises NoPlan."""
        found = search(self._step, self._cluster, timings, budget, allowed, Plan()).best
        assert found.prediction is not None
        return found.plan, found.prediction.step_s

    def of(self, plan: Plan, timings: Timings) -> float:
        """The predicted seconds of a plan. Raises PlanError where the step cannot be run so."""
        return self.prediction(plan, timings).step_s

    def prediction(self, plan: Plan, timings: Timings) -> Prediction:
        """All that is predicted of a plan, with the layers that it deals to stages, or else as many as are best."""
        sample = self._step.observe(replace(plan, layers=None)).sample()
        return predict(sample, plan, timings, groups(plan, self._cluster), dealt=plan.layers)

    def plans(self, timings: Timings) -> Iterator[Plan]:
        """Every plan that the step can be run with, with the layers that its stages would be dealt."""
        for plan in plans(self._cluster.n_devices, self.batch, self._step.layers):
            if plan.pp == 1:
                yield plan
                continue
            with suppress(PlanError):
                stages = self.prediction(plan, timings).stages
                yield replace(plan, layers=tuple(stage.layers for stage in stages))


def profile_of(accelerator: Accelerator, devices: Sequence[Device]) -> Profile:
    """The profile of the devices, measured and kept where there is none."""
    found = store.find(devices)
    if found is None:
        _say(f"measuring {len(devices)} devices")
        found = Measurement(accelerator, store.hardware(devices), STANDARD["cpu"]).run()
        store.save(found)
    return found


def measure(steps: Steps, wanted: Sequence[Plan], accelerator: Accelerator) -> dict[Plan, float]:
    """Seconds of a later step under each plan; nothing for plans that it cannot be run under."""
    graph, tensors = steps.later, made_up(steps.later)
    watch = Stopwatch(accelerator, runs=_RUNS)
    found: dict[Plan, float] = {}
    programs = {}
    for plan in wanted:
        try:
            programs[plan] = lower(graph, plan, [None] * len(graph.inputs))
        except (PlanError, RuntimeError) as error:
            _say(f"{plan}: {error}")
    for _ in range(ROUNDS):
        for plan, program in programs.items():
            seconds = watch.of_program(program, steps.later_scalars, tensors)
            found[plan] = min(seconds, found.get(plan, seconds))
    accelerator.forget()
    return found


def figures_of(steps: Steps, devices: Sequence[Device], most: int | None) -> dict[str, Any]:
    """The figures of the module docstring of one model on `devices`, under `most` plans at the most."""
    cluster = clusters.of_devices(devices)
    predictions = Predictions(steps, cluster)
    accelerator = Accelerator(devices)
    try:
        profile = profile_of(accelerator, devices)
        _say("measuring layers")
        tasks = LayerMeasurement(accelerator, steps.first, None).run()
        timings: dict[str, Timings] = {
            "layers": Profiled(replace(profile, tasks=tasks), cluster),
            "profiled": Profiled(replace(profile, tasks=()), cluster),
            "described": Described(cluster),
        }
        chosen = {how: predictions.best(each)[0] for how, each in timings.items()}
        wanted = _some(list(predictions.plans(timings["layers"])), most)
        measured = measure(steps, list(dict.fromkeys([*chosen.values(), *wanted])), accelerator)
    finally:
        accelerator.close()
    predicted = {how: {plan: predictions.of(plan, each) for plan in measured} for how, each in timings.items()}
    return {
        "plans": [
            {"plan": str(plan), "measured": seconds, **{how: predicted[how][plan] for how in timings}}
            for plan, seconds in measured.items()
        ],
        **{how: summary(chosen[how], predicted[how], measured) for how in timings},
    }


def _some(found: list[Plan], most: int | None) -> list[Plan]:
    """`most` of the plans, evenly spread."""
    if most is None or len(found) <= most:
        return found
    return [found[round(i * (len(found) - 1) / max(1, most - 1))] for i in range(most)]


def summary(chosen: Plan, predicted: Mapping[Plan, float], measured: Mapping[Plan, float]) -> dict[str, Any]:
    """The figures of one way to predict."""
    ratios = [predicted[plan] / seconds for plan, seconds in measured.items()]
    best = min(measured, key=measured.__getitem__)
    return {
        "chosen": str(chosen),
        "best": str(best),
        "regret": measured[chosen] / measured[best],
        "rank": spearman([predicted[plan] for plan in measured], list(measured.values())),
        "error": statistics.mean(abs(ratio - 1) for ratio in ratios),
        "bias": statistics.median(ratios),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of the ranks; 1 where there is nothing to rank."""
    if len(a) < 2:
        return 1.0
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]  # times are never equal
    return float(np.corrcoef(ranks)[0, 1])


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The summaries as Markdown."""
    rows = []
    for name, each in figures.items():
        for how in HOW:
            s = each[how]
            shown = [f"{s['regret']:.3f}", f"{s['rank']:.2f}", f"{s['error']:.0%}", f"{s['bias']:.2f}"]
            rows.append([name, str(len(each["plans"])), how, s["chosen"], *shown, s["best"]])
    head = ["model", "plans", "predicted with", "chosen", "its time / the best", "rank correlation", "mean error"]
    return results.markdown([*head, "predicted / measured", "the best"], rows)


def pooled(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """What each way to predict costs in all: how much longer the chosen plans take than the best, and mean errors."""
    rows = []
    for how in HOW:
        of_all = [each[how] for each in figures.values()]
        lost = sum(s["regret"] - 1 for s in of_all)
        rank, error = (statistics.mean(s[name] for s in of_all) for name in ("rank", "error"))
        rows.append([how, f"{lost:.3f}", f"{rank:.2f}", f"{error:.0%}"])
    head = ["predicted with", "(its time / the best - 1), summed", "mean rank correlation", "mean error"]
    return results.markdown(head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    benchmark = Benchmark(
        "regret",
        "The planner's choice beside every plan of this machine.",
        MODELS,
        ("--devices", "CPU workers", "1,2,4"),
        "a few plans of each model",
        lambda steps, n, quick: figures_of(steps, pool.take(n), 6 if quick else None),
        lambda found: f"{table(found)}\n\n{pooled(found)}\n\n",
    )
    run(benchmark, arguments)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
