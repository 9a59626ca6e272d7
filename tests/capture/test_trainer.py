"""transformers' Trainer: its losses are those of the CPU, and its question about each of them ends no segment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.capture.conftest import Observed

NAN, INFINITE = float("nan"), float("inf")
HAS_A_SUM_THAT_IS_SEEN = int(transformers.__version__.split(".")[0]) >= 5


class Model(nn.Module):
    """Its loss is what it is given, whatever its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": x.sum() + 0 * self.weight.sum()}


def logged(folder: Path, losses: list[float], on_cpu: bool, **options: Any) -> list[float]:
    rows = [{"x": torch.tensor([loss]), "labels": torch.zeros(1)} for loss in losses]
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=1, num_train_epochs=1, logging_steps=3, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=on_cpu, data_seed=0, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(Model(), arguments, train_dataset=rows)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulation"])
def test_losses_that_are_not_finite_are_replaced_as_on_the_cpu(tmp_path: Path, options: dict[str, Any]) -> None:
    losses = [1.0, NAN, 4.0, NAN, INFINITE, 3.0, 2.0, -INFINITE, 6.0, NAN, 1.5, 8.0]
    expected = logged(tmp_path, losses, on_cpu=True, **options)
    assert logged(tmp_path, losses, on_cpu=False, **options) == expected
    assert len(expected) >= 2 and all(loss < 100 for loss in expected)


def test_without_the_filter_they_are_logged(tmp_path: Path) -> None:
    assert logged(tmp_path, [1.0, INFINITE, 4.0], on_cpu=False, logging_nan_inf_filter=False) == [INFINITE]


@pytest.mark.skipif(not HAS_A_SUM_THAT_IS_SEEN, reason="older Trainers keep their sum where nobody sees it")
def test_a_step_is_one_segment_and_its_graph_comes_again(tmp_path: Path, capture: Observed) -> None:
    before = capture.segments
    logged(tmp_path, [1.0] * 12, on_cpu=False)
    assert capture.segments - before <= 12 + 2  # one more for what is logged at the end
    assert len(capture.graphs) <= 6
