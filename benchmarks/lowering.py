"""How long a captured step takes to become a program: `python -m benchmarks.lowering`.

A narrow Qwen2's first training step is captured through the real device, at several depths, and not run: it is lowered
under each plan. Every depth has a process of its own; these take turns, so that all meet the machine as fast as it is
at that time. Figures, by plan and depth ("80" layers), are CPU seconds, the least of `TURNS` times, since other
programs only ever add to them:

- `per_1000_nodes`: lowering, per 1,000 nodes of the captured graph; `lower_s`: of the whole graph, seen the first time.
- `again_s`: of the same graph, when its layers are known from another plan.
- `cached_s`: getting the same program from the cache on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import results
from benchmarks.child import Child
from benchmarks.training import Corpus, Sizes

TURNS = 5
RUN_SECONDS = 600.0
DEVICES = 8
PLANS = (
    *("dp=8", "dp=4,tp=2", "dp=8,micro=4", "dp=8,recompute=full", "dp=8,precision=bf16"),
    "dp=8,distribute_param=true,distribute_low_prec_param=true",
    "dp=4,tp=2,micro=4,recompute=full,distribute_param=true,distribute_low_prec_param=true,precision=bf16",
)


def sizes(layers: int) -> Sizes:
    """A Qwen2 of which only the number of operators matters."""
    return Sizes(layers=layers, hidden=32, intermediate=64, heads=4, kv_heads=2, vocab=128, seq=16, batch=64)


class _Captured(Exception):
    """The step is known, and need not run."""


def measure(connection: Connection, layers: int) -> None:
    """The child's side: the nodes of the graph, and then for each plan that it is told the seconds of one turn."""
    torch.set_num_threads(1)
    model: nn.Module = sizes(layers).model()
    model.cuda()

    from moai import session  # only now, as in any script: the first use of "cuda" has made the session
    from moai.lower import lower, lower_cached
    from moai.lower.depth.steps import layers_of
    from moai.plan.parse import parse

    graphs = []

    def keep(segment: Any) -> Any:
        graphs.append(segment.graph)
        raise _Captured

    recorder = session.current().recorder
    recorder.execute = keep
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, labels = (x.cuda() for x in Corpus(sizes(layers)).batch(0))
    loss = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    optimizer.step()
    with contextlib.suppress(_Captured):
        loss.item()
    (graph,) = graphs
    connection.send(len(graph.nodes))
    given = [None] * len(graph.inputs)
    while True:
        plan = parse(connection.recv(), DEVICES)
        layers_of.cache_clear()
        lower_s, again_s = (_seconds(lambda: lower(graph, plan, given)) for _ in range(2))  # noqa: B023
        lower_cached(graph, plan, given)
        connection.send((lower_s, again_s, _seconds(lambda: lower_cached(graph, plan, given))))  # noqa: B023


def _seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    made = work()
    seconds = time.process_time() - begin
    del made  # only now: freeing a program is no part of making it
    return seconds


def run(depths: Sequence[int], plans: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """The figures, by depth and plan."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        environment = {**os.environ, "XDG_STATE_HOME": folder, "XDG_CACHE_HOME": folder, "MOAI_DEVICES": "1"}
        for name in ("MOAI_FLAVOR", "MOAI_PLAN", "MOAI_PROGRAM_CACHE", "MOAI_VALIDATE"):
            environment.pop(name, None)
        children = {}
        for depth in depths:
            child = Child("lowering", "benchmarks.lowering:measure", {"layers": depth}, environment)
            stack.callback(child.close)
            children[depth] = child
        nodes = {depth: child.receive(RUN_SECONDS) for depth, child in children.items()}
        found: dict[str, dict[str, dict[str, float]]] = {str(depth): {} for depth in depths}
        for plan in plans:
            print(plan, file=sys.stderr, flush=True)
            turns = [{depth: _turn(child, plan) for depth, child in children.items()} for _ in range(TURNS)]
            for depth in depths:
                lower_s, again_s, cached_s = map(min, zip(*(turn[depth] for turn in turns), strict=True))
                each = {"lower_s": lower_s, "again_s": again_s, "cached_s": cached_s}
                found[str(depth)][plan] = {**each, "per_1000_nodes": lower_s / nodes[depth] * 1000}
        return found


def _turn(child: Child, plan: str) -> tuple[float, ...]:
    child.send(plan)
    seconds: tuple[float, ...] = child.receive(RUN_SECONDS)
    return seconds


def table(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    by_depth = figures["by_depth"]
    depths = list(by_depth)
    first, last = depths[0], depths[-1]
    head = [
        "plan",
        *(f"{d} layers, s / 1,000 nodes" for d in depths),
        *(f"{d} layers, s (again, cached)" for d in depths),
    ]
    rows = []
    for plan in by_depth[first]:
        each = [by_depth[d][plan] for d in depths]
        per_node = [f"{e['per_1000_nodes']:.3f}" for e in each]
        whole = [f"{e['lower_s']:.3f} ({e['again_s']:.3f}, {e['cached_s']:.3f})" for e in each]
        ratios = [f"{each[-1][key] / each[0][key]:.1f}" for key in ("lower_s", "again_s")]
        rows.append([plan, *per_node, *whole, *ratios])
    text = results.markdown([*head, f"{last} layers / {first}", "again"], rows)
    return f"{text}\n\nOther programs took {figures['others_cpu']:.0%} of the machine's time."


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lowering", description="How long a captured step takes to become a program."
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--record", action="store_true", help="append them to benchmarks/RESULTS.md")
    parser.add_argument("--layers", default="4,80", help="depths, with commas between")
    parser.add_argument("--plan", action="append", help=f"a plan for {DEVICES} devices, as in MOAI_PLAN; several times")
    options = parser.parse_args(arguments)
    try:
        depths = [int(depth) for depth in options.layers.split(",")]
    except ValueError:
        parser.error("--layers: expected numbers, with commas between")
    machine = results.provenance()
    neighbours = results.Neighbours()
    by_depth = run(depths, options.plan or PLANS)
    figures = {"by_depth": by_depth, "others_cpu": neighbours.share(), "run": machine}
    print(table(figures))
    if options.json:
        results.write_json(options.json, figures)
    if options.record:
        results.record("Lowering", table(figures), machine)


if __name__ == "__main__":
    main()
