"""Rules of operators that make tensors from numbers: any part of the result can be made where it is needed."""

from __future__ import annotations

import torch

from moai.graph.rules.dims import Call, Dims, Rule

aten = torch.ops.aten
moai = torch.ops.moai


def constant(call: Call) -> Dims:
    """The same number everywhere (`lower` spells all of these aten.full)."""
    own = tuple(range(len(call.outputs[0].shape)))
    return Dims((), (own,), sizes={"size": own})


def random_rows(call: Call) -> Dims:
    """Rows that depend on the seed and their global index alone."""
    shape = call.outputs[0].shape
    own = ("row", *(None,) * (len(shape) - 1)) if shape else ()
    return Dims((), (own,), sizes={"size": own}, starts={"start": "row"})


RULES: dict[torch._ops.OpOverload, Rule] = {
    aten.full.default: constant,
    aten.empty.memory_format: constant,
    moai.random.default: random_rows,
}
