"""LSTM and GRU cells.

On devices that are not the CPU torch calls a fused cell, which no CPU worker has. These kernels sit above autograd and
take the cell apart, so that the graph holds operators that every device has, and torch differentiates them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def table() -> dict[str, Callable[..., Any]]:
    """Operator name -> kernel, for the accelerator with and without autograd."""
    return {"_thnn_fused_lstm_cell": _lstm_cell, "_thnn_fused_gru_cell": _gru_cell}


def _biased(gates: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return gates if bias is None else gates + bias


def _lstm_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    cell: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gates [batch, 4 * hidden], cell [batch, hidden] -> the new hidden and cell states, and the gates as workspace."""
    gates = _biased(input_gates, input_bias) + _biased(hidden_gates, hidden_bias)
    enter, forget, new, out = gates.chunk(4, 1)
    new_cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return out.sigmoid() * new_cell.tanh(), new_cell, gates


def _gru_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    hidden: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates [batch, 3 * hidden], hidden [batch, hidden] -> the new hidden state, and the gates as workspace."""
    gates = _biased(input_gates, input_bias)
    reset_in, update_in, new_in = gates.chunk(3, 1)
    reset_hidden, update_hidden, new_hidden = _biased(hidden_gates, hidden_bias).chunk(3, 1)
    reset, update = (reset_in + reset_hidden).sigmoid(), (update_in + update_hidden).sigmoid()
    new = (new_in + reset * new_hidden).tanh()
    return (hidden - new) * update + new, gates
