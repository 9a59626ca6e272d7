"""Is the predicted peak of a device's memory the real one?

    python -m benchmarks.memory [--small] [--json FILE] [--record]

Scripts train models of Hugging Face under plans. Every worker counts, by the events of PyTorch's allocator, what each
run of a program takes at most; that is held against the program's prediction, which is made before anything runs. A
row is the largest program of a training. Compiled code is off: it needs less, and what fits must fit without it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.child import Child

PLANS = (
    "dp=1",
    "dp=2",
    "tp=2",
    "dp=2,tp=2",
    "dp=1,micro=4",
    "dp=2,distribute_param=true",
    "dp=2,distribute_param=true,distribute_low_prec_param=true",
    "dp=4,distribute_param=true,shard=2",
    "dp=1,recompute=default",
    "dp=1,recompute=full",
    "dp=1,precision=bf16",
    "dp=3,precision=bf16",
    "dp=1,pp=2,micro=8",
    "dp=1,pp=2,micro=8,schedule=zero_bubble",
    "dp=1,pp=2,micro=8,schedule=interleaved",
    "dp=2,tp=2,micro=2,recompute=full,distribute_param=true,distribute_low_prec_param=true,precision=bf16",
)
# How far a prediction may be from what is counted.
OVER, UNDER = 0.05, -0.03
_STEPS = 2  # the first one makes the optimizer's states
_SECONDS = 300.0

_LLAMA = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_LLAMA, "num_hidden_layers": 4, "vocab_size": 2000}),
    "gpt2": ("GPT2Config", {"n_embd": 256, "n_layer": 4, "n_head": 8, "vocab_size": 500}),
    "qwen2": ("Qwen2Config", {**_LLAMA, "num_hidden_layers": 6, "vocab_size": 250, "tie_word_embeddings": True}),
}


@dataclass(frozen=True, slots=True)
class Row:
    """The largest program of a training: bytes of the device that takes most."""

    model: str
    plan: str
    predicted: int
    counted: int

    @property
    def error(self) -> float:
        """How much too large the prediction is, as a share of what was counted."""
        return self.predicted / self.counted - 1


def train(connection: Connection, models: Sequence[str], batch: int, sequence: int) -> None:
    """The script. A message for each model, when its training is over."""
    for name in models:
        _train(name, batch, sequence)
        connection.send(name)
        connection.recv()


def _train(name: str, batch: int, sequence: int) -> None:
    import transformers  # not in the parent

    config_class, sizes = _MODELS[name]
    config = getattr(transformers, config_class)(**sizes)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    for _ in range(_STEPS):
        tokens = torch.randint(0, config.vocab_size, (batch, sequence)).cuda()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert math.isfinite(loss.item())
    torch.cuda.synchronize()


def measure(plans: Sequence[str], models: Sequence[str], batch: int, sequence: int) -> Iterator[Row | str]:
    """A row for each plan and model, or why there is none."""
    for plan in plans:
        print(plan, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            settings = {"models": list(models), "batch": batch, "sequence": sequence}
            child = Child(plan, "benchmarks.memory:train", settings, _environment(plan, Path(folder)))
            seen = 0
            try:
                for _ in models:
                    name = child.receive(_SECONDS)
                    runs = _runs(Path(folder))
                    yield _row(name, plan, runs[seen:])
                    seen = len(runs)
                    child.send("next")
            except RuntimeError as error:
                yield f"{plan}: {error}"
            finally:
                child.close()


def _environment(plan: str, folder: Path) -> dict[str, str]:
    devices = math.prod(int(size) for size in re.findall(r"\b(?:dp|tp|pp)=(\d+)", plan))
    chosen = {name: value for name, value in os.environ.items() if not name.startswith(("MOAI_", "MOREH_"))}
    return {
        **chosen,
        "XDG_STATE_HOME": str(folder / "state"),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "OMP_NUM_THREADS": "1",
        "MOAI_CUDA": "1",
        "MOAI_DEVICES": str(devices),
        "MOAI_PLAN": plan,
        "MOAI_COMPILE": "never",
        "MOAI_MEMORY_LOG": str(folder / "memory"),
    }


def _runs(folder: Path) -> list[dict[str, Any]]:
    """What the workers have counted, in the order of the runs on each."""
    found = [(k, json.loads(line)) for file in folder.glob("memory.*") for k, line in enumerate(file.open())]
    return [run for _, run in sorted(found, key=lambda run: run[0])]


def _row(model: str, plan: str, runs: Sequence[dict[str, Any]]) -> Row:
    largest = max(runs, key=lambda run: run["counted"])
    return Row(model, plan, largest["predicted"], largest["counted"])


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    cells = [
        (row.model, row.plan, f"{row.predicted / 2**20:.1f}", f"{row.counted / 2**20:.1f}", f"{row.error:+.1%}")
        for row in rows
    ]
    return results.markdown(("model", "plan", "predicted, MiB", "counted, MiB", "error"), cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a prediction is too far off, or a training failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="The predicted peak of memory beside the counted one."
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--record", action="store_true", help="append them to benchmarks/RESULTS.md")
    parser.add_argument("--plans", default=";".join(PLANS), help="plans, with semicolons between")
    parser.add_argument("--models", default=",".join(_MODELS), help=f"some of {','.join(_MODELS)}")
    parser.add_argument("--small", action="store_true", help="a batch without weight")
    options = parser.parse_args(arguments)
    models = options.models.split(",")
    if not set(models) <= set(_MODELS):
        parser.error(f"--models: expected some of {','.join(_MODELS)}")
    machine = results.provenance()
    batch, sequence = (4, 16) if options.small else (16, 128)
    found = list(measure(options.plans.split(";"), models, batch, sequence))
    rows = [row for row in found if isinstance(row, Row)]
    failures = [row for row in found if isinstance(row, str)]
    failures += [f"{r.model} under {r.plan} is off by {r.error:+.1%}" for r in rows if not UNDER <= r.error <= OVER]
    print(table(rows), *failures, sep="\n")
    if options.json:
        results.write_json(options.json, {"rows": [asdict(row) for row in rows], "failures": failures, "run": machine})
    if options.record:
        results.record("Memory", table(rows), machine)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
