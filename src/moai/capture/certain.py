"""What is certain whatever the data: a script that asks for it waits for nothing.

In: the pending calls of a segment, and a storage that they wrote. Out: its content, where that follows from the calls
alone: what `nan_to_num` has made is neither NaN nor infinite.
"""

from __future__ import annotations

import torch

from moai.capture.segment import OpenSegment
from moai.capture.trace import Call, OutSpec, out_specs, tensor_specs, written_specs
from moai.capture.values import Record

_QUESTIONS = frozenset({"aten.isnan.default", "aten.isinf.default"})
_FINITE = "aten.nan_to_num.default"
# So many calls back nothing is looked for: who asks, asks soon.
_CALLS = 16


def content(segment: OpenSegment, record: Record) -> torch.Tensor | None:
    """What the storage holds, in its base geometry; None where only the data tell."""
    question = record.made_by
    if record.base[2] != torch.bool or question is None or question.operator.name not in _QUESTIONS:
        return None
    (asked,) = tensor_specs(question)
    if not _is_finite(segment.cursor, asked.sid, question, record.sid):
        return None
    size, stride, dtype = record.base
    return torch.empty_strided(size, stride, dtype=dtype).zero_()


def _is_finite(end: Call, sid: int, question: Call, answer: int) -> bool:
    """Whether storage `sid` still holds what `nan_to_num` made, and `answer` what the question was answered."""
    node: Call | None = end
    has_asked = False
    for _ in range(_CALLS):
        if node is None or node.operator is None:
            return False
        if any(spec.sid in (sid, answer) for spec in written_specs(node)):
            return False
        has_asked = has_asked or node is question
        if any(spec.sid == sid for spec in out_specs(node.outs)):
            takes_defaults = len(node.args) == 1 and not node.kwargs
            return has_asked and node.operator.name == _FINITE and isinstance(node.outs, OutSpec) and takes_defaults
        node = node.parent
    return False
