"""A plain single-device script: trains models for a few steps, and leaves what came of each in a file.

    python -m benchmarks.numerics.script DEVICE FOLDER CASE...

A case ends as `FOLDER/CASE.pt`: the losses, the gradients' norms before clipping, and all parameters; or as
`FOLDER/CASE.error`: what was raised. After an error that is no refusal of the case (ValueError) nothing more is tried.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.numerics.models import IGNORED, MODELS, Optimizer

SEQUENCE = 12
LEARNING_RATE = 1e-3
MAX_NORM = 0.5  # less than most norms here: steps are clipped


@dataclass(frozen=True, slots=True)
class Case:
    """`layers`: of the model. `precision`: fp64 and fp32 are what the model is in; bf16 is a model in fp32 whose
    products are in bf16."""

    model: str
    precision: str
    batch: int
    steps: int
    layers: int = 2

    def __str__(self) -> str:
        return f"{self.model},{self.precision},{self.batch},{self.steps},{self.layers}"

    @staticmethod
    def parse(text: str) -> Case:
        model, precision, *numbers = text.split(",")
        return Case(model, precision, *map(int, numbers))


@dataclass(frozen=True, slots=True)
class Training:
    """What came of a case: `losses` and `norms` of the steps, in fp64; `parameters` by name."""

    losses: torch.Tensor
    norms: torch.Tensor
    parameters: dict[str, torch.Tensor]


def batches(case: Case) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, mask and labels of every step, [batch, seq] each.

    Some samples are padded; how many labels count differs from sample to sample and from step to step, and one sample
    has none: a mean of means is another number than the mean.
    """
    model = MODELS[case.model]
    generator = torch.Generator().manual_seed(1)
    for step in range(case.steps):
        tokens = torch.randint(0, model.vocabulary, (case.batch, SEQUENCE), generator=generator)
        mask = torch.ones_like(tokens)
        if model.padding != "none":
            mask[1, -(2 + step % 4) :] = 0
            mask[-2, -5:] = 0
        if model.padding == "both":
            mask[0, : 3 + step % 3] = 0
            mask[-3, :4] = 0
        labels = tokens.masked_fill(mask == 0, IGNORED)
        labels[0, : step % SEQUENCE] = IGNORED
        labels[2] = IGNORED
        labels[-1, 3:] = IGNORED
        yield tokens, mask, labels


def optimizer(name: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW blows the rounding of a gradient that is nearly zero (a key's bias: exactly) up by lr / eps: an `eps` that
    is not tiny leaves something to compare."""
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=100 * LEARNING_RATE, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-4, fused=True if name == "fused" else None)


def train(case: Case, device: str) -> Training:
    """Train on `device`. Plain PyTorch computes bf16 cases under autocast; the accelerator's plan does it by itself."""
    torch.manual_seed(0)
    chosen = MODELS[case.model]
    model = chosen.make(case.layers).to(torch.float64 if case.precision == "fp64" else torch.float32).to(device).train()
    optim = optimizer(chosen.optimizer, model)
    autocast = device == "cpu" and case.precision == "bf16"
    losses, norms = [], []
    for tokens, mask, labels in batches(case):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = chosen.loss(model, tokens.to(device), mask.to(device), labels.to(device))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optim.step()
        optim.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    parameters = {name: p.detach().cpu() for name, p in model.named_parameters()}
    return Training(torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64), parameters)


def main(device: str, folder: Path, cases: list[Case]) -> None:
    """See the module docstring."""
    for case in cases:
        try:
            training = train(case, device)
        except Exception as error:
            (folder / f"{case}.error").write_text(f"{type(error).__name__}: {error}")
            if not isinstance(error, ValueError):
                raise
        else:
            file = folder / f"{case}.pt"
            torch.save([training.losses, training.norms, training.parameters], file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), [Case.parse(text) for text in sys.argv[3:]])
