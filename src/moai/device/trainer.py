"""transformers' Trainer, which asks after every step whether the loss is NaN: the answer is computed, and not waited
for.

In: `Trainer.training_step`. Out: the same losses. With `logging_nan_inf_filter`, which is on unless a script says
otherwise, a loss that is NaN or infinite is replaced by the average of those since the last log. Here that is done
where the loss is, and what is asked then has only one answer (`capture.certain`): a step stays in one piece.

Trainers older than transformers 5 keep the sum of their losses where nobody sees it, and go on to ask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from moai.device.importing import when_imported


def install() -> None:
    """Changes transformers when a script imports it. Call once."""
    when_imported("transformers.trainer", _change)


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
