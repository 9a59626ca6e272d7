"""Training steps of small models, as graphs: what planning is tried on.

In: a model of Hugging Face, by its config, and a batch. Out: the graphs of its first step and of a later one, whose
optimizer finds its states. A process of its own records them as a dry run does: no devices are needed.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

import moai.graph.ops  # noqa: F401  # graphs name its operators
from benchmarks.child import Child
from moai.graph.step_graph import StepGraph

_STEPS = 3  # the second may still differ in what is held at its end
_SECONDS = 120.0
_MEMORY = 1 << 34  # that scripts believe in


@dataclass(frozen=True, slots=True)
class Script:
    """`config`: a class of transformers, made with `sizes`; `batch` samples of `sequence` tokens."""

    config: str
    sizes: Mapping[str, Any]
    batch: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Steps:
    """`first` and `later` steps of a script, with the scalars of each."""

    script: Script
    first: StepGraph
    later: StepGraph
    first_scalars: Sequence[float | int]
    later_scalars: Sequence[float | int]


@contextmanager
def recording() -> Iterator[Recording]:
    """Scripts' steps while it lasts."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MOAI_", "MOREH_"))}
    it = Recording({**environment, "MOAI_CUDA": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"})
    try:
        yield it
    finally:
        it.close()


class Recording:
    """The process that records; see `recording`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._child = Child("recording", "benchmarks.steps:record", {}, environment)

    def steps(self, script: Script) -> Steps:
        """RuntimeError if the script fails."""
        self._child.send(asdict(script))
        (first, first_scalars), (later, later_scalars) = pickle.loads(self._child.receive(_SECONDS))
        return Steps(script, first, later, first_scalars, later_scalars)

    def close(self) -> None:
        """Let the process end."""
        self._child.close()


def record(connection: Connection) -> None:
    """The child's side: scripts come in, and go out as graphs with scalars."""
    from moai.dry.pickling import packed
    from moai.dry.session import DrySession

    torch.set_num_threads(1)
    session: Any = DrySession(lambda _: None, _MEMORY)  # type: ignore[arg-type, return-value]  # it goes on
    torch.cuda.init()
    run, trained = session.recorder.execute, []

    def keep(segment: Any) -> Any:
        if segment.graph.trains:
            trained.append((segment.graph, tuple(segment.scalars)))
        return run(segment)

    session.recorder.execute = keep
    while True:
        trained.clear()
        _train(Script(**connection.recv()))
        connection.send(packed((trained[0], trained[-1])))


def _train(script: Script) -> None:
    import transformers

    config = getattr(transformers, script.config)(**script.sizes)
    config._attn_implementation = "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config).train().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    for _ in range(_STEPS):
        tokens = torch.zeros(script.batch, script.sequence, dtype=torch.int64, device="cpu").cuda()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def made_up(graph: StepGraph) -> list[torch.Tensor]:
    """Inputs for a run of `graph`: numbers below 8 where they are whole, and small ones above 0 where they are not,
    so that no operator meets what would take it another time than usual."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    found = []
    for each in graph.inputs:
        type_ = graph.types[each.id]
        if type_.dtype.is_floating_point:
            x = torch.rand(type_.shape, generator=generator, device="cpu").mul_(0.02)
        else:
            x = torch.randint(0, 8, type_.shape, generator=generator, device="cpu")
        found.append(x.to(type_.dtype))
    return found
