"""Training steps captured from scripts, with what they were run on: for tests of rewrites of a step's nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise

import pytest
import torch
import transformers
from torch import nn

from moai.capture.recorder import Segment
from moai.graph.step_graph import Node, StepGraph, TensorType, flat_ids
from moai.lower.activations import Activations
from moai.lower.canonical import canonical
from moai.lower.recompute import recomputed
from moai.plan.plan import Recompute
from tests.capture.conftest import Observed
from tests.lower.nodes import interpret

LAYERS = 6
VOCABULARY = 128


@dataclass(frozen=True)
class Step:
    """A captured training step with what it was run on."""

    graph: StepGraph
    given: dict[int, torch.Tensor]
    scalars: list[float | int]

    @cached_property
    def _canonical(self) -> tuple[list[Node], tuple[TensorType, ...], list[int]]:
        return canonical(self.graph)

    @property
    def nodes(self) -> list[Node]:
        return self._canonical[0]

    def recomputed(self, level: Recompute, budget: int | None = None) -> list[Node]:
        nodes, types, outputs = self._canonical
        return recomputed(nodes, list(types), self.graph.inputs, outputs, level, budget)[0]

    def run(self, nodes: Sequence[Node]) -> tuple[list[torch.Tensor], int]:
        return interpret(nodes, self.given, self._canonical[2], self.scalars)

    def saved(self, nodes: Sequence[Node]) -> int:
        """The bytes that the forward of `nodes` makes and the backward reads (ids of the original nodes only)."""
        _, types, outputs = self._canonical
        extra = max((i for n in nodes for i in flat_ids(n.outs)), default=0) + 1 - len(types)
        some = TensorType((), torch.float32)  # copies are made by the backward: their types do not matter here
        return sum(Activations(nodes, [*types, *[some] * extra], self.graph.inputs, outputs).saved.values())


# ---------------------------------------------------------------------- scripts


def language_model(config: transformers.PretrainedConfig, experts: str = "batched_mm") -> Callable[[str], None]:
    def script(device: str) -> None:
        config._attn_implementation, config._experts_implementation = "sdpa", experts
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).train().to(device)
        tokens = torch.randint(0, VOCABULARY, (8, 32)).to(device)
        train(model, lambda: model(tokens, labels=tokens, use_cache=False).loss)

    return script


@cache  # the same script again, which is captured once
def llama_with_adamw(batch: int, length: int, times: int = 1, **config: int) -> Callable[[str], None]:
    """Steps of AdamW on `batch` x `length` zeros, for tests of where values lie, not of what they are."""
    made = transformers.LlamaConfig(**config, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None)

    def script(device: str) -> None:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(made).train().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        tokens = torch.zeros(batch, length, dtype=torch.int64).to(device)
        for _ in range(times):
            optimizer.zero_grad()
            loss = model(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            loss.item()

    return script


def train(model: nn.Module, loss: Callable[[], torch.Tensor], times: int = 1) -> None:
    """One step of plain SGD on the gradients of `times` losses."""
    for _ in range(times):
        last = loss()
        last.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    last.item()  # ends the step


def sizes(layers: int) -> dict[str, int]:
    return {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
    }


def llama(layers: int = LAYERS) -> Callable[[str], None]:
    return language_model(transformers.LlamaConfig(**sizes(layers)))


def gpt2() -> Callable[[str], None]:  # with dropout
    small = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY}
    return language_model(transformers.GPT2Config(**small))


def mixture_of_experts() -> Callable[[str], None]:
    return language_model(transformers.MixtralConfig(num_local_experts=4, **sizes(3)))


def classifier(model: Callable[[], nn.Module], shape: tuple[int, ...], times: int = 1) -> Callable[[str], None]:
    def script(device: str) -> None:
        torch.manual_seed(0)
        net = model().train().to(device)
        x, y = torch.randn(shape).to(device), torch.randint(0, 10, shape[:1]).to(device)
        train(net, lambda: nn.functional.cross_entropy(net(x), y), times)

    return script


def perceptron() -> nn.Module:
    return nn.Sequential(*(m for _ in range(24) for m in (nn.Linear(32, 32), nn.Tanh())), nn.Linear(32, 10))


def pyramid() -> nn.Module:
    """A CNN in which no two layers are alike."""
    widths = [3, 8, 12, 16, 24, 32]
    convolutions = [
        m for a, b in pairwise(widths) for m in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
    ]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


SCRIPTS: dict[str, Callable[[str], None]] = {
    "llama": llama(),
    "one_layer": llama(1),
    "gpt2_with_dropout": gpt2(),
    "mixture_of_experts": mixture_of_experts(),
    "perceptron": classifier(perceptron, (512, 32)),
    "pyramid": classifier(pyramid, (4, 3, 16, 16)),
    "accumulated": classifier(pyramid, (4, 3, 16, 16), times=2),
}
_steps: dict[Callable[[str], None], Step] = {}


def capturing(capture: Observed, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | Callable[[str], None]], Step]:
    """A function that gives the last training step of a script, or of one of SCRIPTS by name; each is captured once."""
    segments: list[Step] = []

    def execute(segment: Segment) -> list[torch.Tensor]:
        for value in segment.inputs:
            value.buffer = value.host if value.buffer is None else value.buffer
        given = {i.id: v.buffer.clone() for i, v in zip(segment.graph.inputs, segment.inputs, strict=True)}
        segments.append(Step(segment.graph, given, list(segment.scalars)))
        return capture.executor.execute(segment)

    monkeypatch.setattr(capture.recorder, "execute", execute)

    def step_of(script: str | Callable[[str], None]) -> Step:
        if isinstance(script, str):
            script = SCRIPTS[script]
        if script not in _steps:
            script("cuda")
            _steps[script] = next(s for s in reversed(segments) if s.graph.trains)
        return _steps[script]

    return step_of


def computed_again(step: Step, nodes: Sequence[Node]) -> list[Node]:
    """The copies among `nodes`."""
    there = {i for n in step.nodes for i in flat_ids(n.outs)}
    return [n for n in nodes if there.isdisjoint(flat_ids(n.outs))]
