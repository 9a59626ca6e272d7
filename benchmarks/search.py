"""How long it takes to plan from nothing: `python -m benchmarks.search`.

Llama-3-8B on 64 H100s and Llama-3-70B on 1,024, which are not there: each time a new process captures the training step
on tensors without data and searches all plans. Configs are written here; nothing is downloaded. Seconds of the wall, by
what they went to:

- `total_s`: from the start of the process until it knows the plan; `start_s`: of that, the interpreter's and imports.
- `capture_s`: the step's graph, from a process of its own; `search_s`: the plan. `observe_s`: of that, observations.
- `cpu_s`: of the process and of those that it started; beside it, what other programs took of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.child import Child

# What the figures are to be at the most, on two cores.
GOALS = {"Llama-3-8B": 10.0, "Llama-3-70B": 60.0}
REPEATS = 3
RUN_SECONDS = 600.0
BLOCK_SIZE = 2048
MEMORY_SHARE = 0.8

_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32}
_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
CASES: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {"config": {**_LLAMA_3, **_8B}, "cluster": "h100:64", "batch": 512},
    "Llama-3-70B": {"config": {**_LLAMA_3, **_70B}, "cluster": "h100:1024", "batch": 1024},
}


def measure(connection: Connection, config: Mapping[str, Any], cluster: str, batch: int) -> None:
    """The child's side: the figures of one search."""
    # Only now, as in the command: torch is imported while the step is captured.
    from moai.dry.capture import capture_model
    from moai.dry.messages import ModelStep

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        step = ModelStep(folder, batch, BLOCK_SIZE, "float32")
        graph = capture_model(step, 80 << 30, RUN_SECONDS).graph
    capture_s = time.perf_counter() - begin

    from moai.lower.sampling import layers, observe
    from moai.plan.cluster_file import load
    from moai.plan.plan import Plan
    from moai.plan.search import Step, search
    from moai.plan.space import Allowed
    from moai.plan.timings import Described

    seconds = []

    def observed(plan: Plan) -> Any:
        start = time.perf_counter()
        found = observe(graph, plan)
        seconds.append(time.perf_counter() - start)
        return found

    begin = time.perf_counter()
    hardware = load(cluster)
    budget = int(hardware.device.memory_bytes * MEMORY_SHARE)
    asked = Step(observed, batch, batch * BLOCK_SIZE, layers(graph, [None] * len(graph.inputs)))
    choice = search(asked, hardware, Described(hardware), budget, Allowed(), Plan(precision="bf16"))
    search_s = time.perf_counter() - begin
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    assert choice.best.prediction is not None
    connection.send(
        {
            "capture_s": capture_s,
            "search_s": search_s,
            "observe_s": sum(seconds),
            "cpu_s": sum(each.ru_utime + each.ru_stime for each in used),
            "nodes": len(graph.nodes),
            "observations": len(seconds),
            "candidates": len(choice.candidates),
            "plan": str(choice.best.plan),
            "step_s": choice.best.prediction.step_s,
        }
    )


def run(case: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_STATE_HOME": folder, "XDG_CACHE_HOME": folder, "HF_HUB_OFFLINE": "1"}
        for name in ("MOAI_FLAVOR", "MOAI_PLAN", "MOAI_VALIDATE"):
            environment.pop(name, None)
        begin = time.perf_counter()
        child = Child("search", "benchmarks.search:measure", case, environment)
        try:
            figures = child.receive(RUN_SECONDS)
            total_s = time.perf_counter() - begin
        finally:
            child.close()
    start_s = total_s - figures["capture_s"] - figures["search_s"]
    return {"total_s": total_s, "start_s": start_s, **figures}


def table(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown: the quickest run of each case, and the slowest one's total."""
    from benchmarks import results

    parts = ("start_s", "capture_s", "search_s", "observe_s", "cpu_s")
    rows = []
    for name, runs in figures["runs"].items():
        best, slowest = min(runs, key=_total), max(runs, key=_total)
        seconds = [f"{best['total_s']:.1f} ({slowest['total_s']:.1f})", *(f"{best[part]:.1f}" for part in parts)]
        found = [str(best["observations"]), str(best["candidates"]), best["plan"]]
        rows.append([f"{name}, {CASES[name]['cluster']}", f"{GOALS[name]:.0f}", *seconds, *found])
    head = ["case", "goal, s", "total_s (slowest)", *parts, "observations", "candidates", "plan"]
    others = f"Other programs took {figures['others_cpu']:.0%} of the machine's time."
    return f"{results.markdown(head, rows)}\n\n{others}"


def _total(figures: Mapping[str, Any]) -> float:
    return float(figures["total_s"])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from benchmarks import results  # not above: it imports torch, which the child is to do when the command does

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description="How long it takes to plan from nothing."
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--record", action="store_true", help="append them to benchmarks/RESULTS.md")
    parser.add_argument("--case", action="append", choices=CASES, help="one of the cases; several times")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="processes for each case")
    options = parser.parse_args(arguments)
    machine = results.provenance()
    neighbours = results.Neighbours()
    runs = {}
    for name in options.case or CASES:
        print(name, file=sys.stderr, flush=True)
        runs[name] = [run(CASES[name]) for _ in range(max(1, options.repeats))]
    figures = {"runs": runs, "goals": GOALS, "others_cpu": neighbours.share(), "run": machine}
    print(table(figures))
    if options.json:
        results.write_json(options.json, figures)
    if options.record:
        results.record("Search", table(figures), machine)


if __name__ == "__main__":
    main()
