"""How long is a token of a text that transformers generates, beside plain PyTorch on the same cores?

    python -m benchmarks.generation [--small] [--json FILE] [--record]

Llamas of some sizes generate greedily with a batch of two, one of them padded. Every peer has a process of its own; all
of a size are alive side by side and take turns, so that what the machine does meanwhile hits all of them. All have the
same cores: PyTorch's threads, or the devices'. What is set up at the first texts is not counted.

A ratio is of two texts that were made one after another. CPU is that of all of a peer's processes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.child import Child

PLAIN = "PyTorch"
# layers, width, vocabulary
SIZES = {"4 x 128": (4, 128, 512), "8 x 512": (8, 512, 4096), "8 x 1024": (8, 1024, 8192)}
_SECONDS = 300.0
_WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Text:
    """A text: seconds and CPU seconds a token, and the tokens."""

    seconds: float
    cpu_seconds: float
    tokens: list[list[int]]


def generate(connection: Connection, size: str, device: str, tokens: int) -> None:
    """The script. A text for each message."""
    import transformers  # not in the parent

    layers, width, vocabulary = SIZES[size]
    heads = width // 64 if width > 128 else 4
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model: Any = transformers.LlamaForCausalLM(config).eval().to(device)
    prompt = torch.randint(3, vocabulary, (2, 16))
    prompt[1, :5] = 2
    mask = prompt.ne(2).long()
    while True:
        cpu, begin = results.cpu_seconds(os.getpid()), time.perf_counter()
        ids, seen = prompt.to(device), mask.to(device)
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        found = model.generate(ids, attention_mask=seen, do_sample=False, **length).cpu()
        seconds = time.perf_counter() - begin
        used = results.cpu_seconds(os.getpid()) - cpu
        connection.send(Text(seconds / tokens, used / tokens, found.tolist()))
        connection.recv()


def measure(size: str, tokens: int, rounds: int, devices: Sequence[int]) -> dict[str, Any]:
    """The figures of a size, by peer. RuntimeError if a peer fails, or makes another text than plain PyTorch."""
    with tempfile.TemporaryDirectory() as state:
        peers = {PLAIN: "cpu"} | {f"MoAI, {n} {'worker' if n == 1 else 'workers'}": "cuda" for n in devices}
        counts = [0, *devices]
        children = []
        try:
            for (name, device), count in zip(peers.items(), counts, strict=True):
                settings = {"size": size, "device": device, "tokens": tokens}
                child = Child(name, "benchmarks.generation:generate", settings, _environment(count, Path(state)))
                children.append(child)
                child.receive(_SECONDS)
            texts: dict[str, list[Text]] = {name: [] for name in peers}
            for _ in range(_WARM_UP + rounds):
                for child, name in zip(children, peers, strict=True):
                    child.send("next")
                    texts[name].append(child.receive(_SECONDS))
        finally:
            for child in children:
                child.close()
    plain = texts[PLAIN][_WARM_UP:]
    figures = {}
    for name, made in texts.items():
        if any(text.tokens != plain[0].tokens for text in made):
            raise RuntimeError(f"{name} makes another text of the model of {size} than {PLAIN}")
        counted = made[_WARM_UP:]
        figures[name] = {
            "ms": results.quartiles(text.seconds * 1e3 for text in counted),
            "cpu_ms": results.quartiles(text.cpu_seconds * 1e3 for text in counted),
            "ratio": results.quartiles(a.seconds / b.seconds for a, b in zip(counted, plain, strict=True)),
        }
    return figures


def _environment(devices: int, state: Path) -> dict[str, str]:
    chosen = {name: value for name, value in os.environ.items() if not name.startswith(("MOAI_", "MOREH_"))}
    chosen |= {"XDG_STATE_HOME": str(state), "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    return chosen | ({"MOAI_DEVICES": str(devices)} if devices else {"MOAI_CUDA": "0"})


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown, a row for each size and peer."""
    rows = [
        (size, name, results.spread(peer["ms"], digits=2), results.spread(peer["cpu_ms"], digits=1), _ratio(name, peer))
        for size, peers in figures.items()
        for name, peer in peers.items()
    ]
    return results.markdown(("layers x width", "peer", "ms a token", "CPU ms a token", "times PyTorch's"), rows)


def _ratio(name: str, peer: dict[str, Any]) -> str:
    return "" if name == PLAIN else results.spread(peer["ratio"], digits=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation", description="How long a generated token takes beside plain PyTorch."
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--record", action="store_true", help="append them to benchmarks/RESULTS.md")
    parser.add_argument("--small", action="store_true", help="one size, few tokens: whether everything runs")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a text")
    parser.add_argument("--rounds", type=int, default=15, help="texts of each peer")
    options = parser.parse_args(arguments)
    if min(options.tokens, options.rounds) < 1:
        parser.error("--tokens and --rounds must be 1 or more")
    sizes = list(SIZES)[:1] if options.small else list(SIZES)
    tokens, rounds = (8, 1) if options.small else (options.tokens, options.rounds)
    machine, neighbours = results.provenance(), results.Neighbours()
    figures = {size: measure(size, tokens, rounds, (1, 2)) for size in sizes}
    others = neighbours.share()
    said = f"{tokens} tokens a text, {rounds} texts; {others:.0%} of the machine's time went to others"
    print(f"generation ({said})\n\n{table(figures)}")
    if options.json:
        results.write_json(options.json, {"sizes": figures, "others_cpu": others, "run": machine})
    if options.record:
        results.record("Generation", f"{said}\n\n{table(figures)}", machine)


if __name__ == "__main__":
    main()
