"""About how long instructions take, compared with each other."""

from __future__ import annotations

import math

from moai.graph.step_graph import flat_ids
from moai.lower.cleanup import uses
from moai.lower.operators import BUILTINS, is_view
from moai.lower.program import Instruction
from moai.lower.values import Values

# Calculations that take as long as moving a byte.
_PER_BYTE = 32.0
_ATTENTION = "moai.sdpa.default"
_PRODUCTS = frozenset({"aten.mm.default", "aten.bmm.default", "aten.mv.default", "moai.matmul.default"})
_CONVOLUTIONS = frozenset({"aten.convolution.default"})
_LOOKUPS = frozenset({"aten.embedding.default", "aten.index_select.default", "aten.gather.default"})


def effort(instruction: Instruction, values: Values) -> float:
    """In calculations. Sizes are those of whole tensors: every device has the same share of each."""
    op = instruction.op
    if op in BUILTINS or is_view(op):
        return 0.0
    made = [values.types[i] for i in flat_ids(instruction.outs)]
    read = [values.types[i] for i in uses(instruction)]
    if op in _LOOKUPS:
        read = read[1:]
    moved = _PER_BYTE * sum(t.nbytes for t in (*made, *read))
    if op in _PRODUCTS and made:
        return moved + 2.0 * made[0].numel * read[0].shape[-1]
    if op in _CONVOLUTIONS and made:
        return moved + 2.0 * made[0].numel * math.prod(read[1].shape[1:])
    if op == _ATTENTION:
        query, key = read[0].shape, read[1].shape
        return moved + 4.0 * math.prod(query) * key[-2]
    return moved
