"""Trainers of transformers and trl, which look at every step's loss and metrics: numbers are computed, and not waited
for, so that a step stays in one piece.

In: `Trainer.training_step`, and `compute_loss` of trl's trainers. Out: the same losses and metrics.

transformers' Trainer asks after every step whether the loss is NaN. With `logging_nan_inf_filter`, which is on unless a
script says otherwise, a loss that is NaN or infinite is replaced by the average of those since the last log. Here that
is done where the loss is, and what is asked then has only one answer (`capture.certain`). Trainers older than
transformers 5 keep the sum of their losses where nobody sees it, and go on to ask.

trl's trainers keep numbers of every step for the next log (`_metrics`), and get them between forward and backward. Here
these are fetched when they are looked at, or some steps later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from moai.device.importing import when_imported
from moai.device.later import Later, numbers_later

_TRL = {
    "sft_trainer": "SFTTrainer",
    "dpo_trainer": "DPOTrainer",
    "kto_trainer": "KTOTrainer",
    "reward_trainer": "RewardTrainer",
}
# Numbers of so many steps are left where they are: these are still being computed.
_STEPS = 2


def install() -> None:
    """Changes transformers and trl when a script imports them. Call once."""
    when_imported("transformers.trainer", _change)
    for name, kind in _TRL.items():
        when_imported(f"trl.trainer.{name}", functools.partial(_change_trl, kind=kind))


def _change(module: Any) -> None:
    module.Trainer.training_step = _filtered(module.Trainer.training_step)


def _filtered(training_step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(training_step)
    def filtered(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = training_step(self, *args, **kwargs)
        so_far = getattr(self, "_tr_loss", None)
        if so_far is None or not self.args.logging_nan_inf_filter or loss.device.type == "cpu":
            return loss
        # A tensor, as a number would be a part of the step, which then is another one after every log.
        steps = torch.tensor(1.0 + self.state.global_step - self._globalstep_last_logged, device=loss.device)
        return torch.nan_to_num(torch.where(torch.isfinite(loss), loss, so_far / steps))

    return filtered


def _change_trl(module: Any, kind: str) -> None:
    trainer = getattr(module, kind, None)
    if trainer is not None:
        trainer.compute_loss = _without_waiting(trainer.compute_loss, module.__name__)


def _without_waiting(compute_loss: Callable[..., Any], module: str) -> Callable[..., Any]:
    @functools.wraps(compute_loss)
    def computed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with numbers_later(module):
            result = compute_loss(self, *args, **kwargs)
        for kept in getattr(self, "_metrics", {}).values():
            for numbers in kept.values():
                if isinstance(numbers, list):
                    _fetch(numbers)
        return result

    return computed


def _fetch(numbers: list[Any]) -> None:
    """All but the last few."""
    for at in range(len(numbers) - _STEPS - 1, -1, -1):
        if not isinstance(numbers[at], Later):
            return
        numbers[at] = numbers[at].value()
