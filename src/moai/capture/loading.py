"""Loading a checkpoint: what is copied from one tensor to another while both are on the host.

In: a copy between accelerator tensors. Out: whether it was done here. The first step after loading is then a step like
those behind it, and its parameters are in memory once.
"""

from __future__ import annotations

import torch

from moai.capture.values import Record, Value, geometry_of, record_of


def hand_on(target: torch.Tensor, source: torch.Tensor, epoch: int) -> bool:
    """Gives `target` the content of `source`, a state that the devices have not seen, if both are whole and alike.
    `epoch`: that of the segment being recorded, which must not have met either."""
    to, of = record_of(target), record_of(source)
    value = of.value
    if value is None or value.role != "state" or value.host is None or value.buffer is not None:
        return False
    if to.base != of.base or epoch in (to.epoch, of.epoch) or not (_is_whole(target, to) and _is_whole(source, of)):
        return False
    to.value, to.made_by = Value(host=value.host), None  # which is never written to
    return True


def _is_whole(tensor: torch.Tensor, record: Record) -> bool:
    size, stride, offset, dtype = geometry_of(tensor)
    return (size, stride, dtype) == record.base and not offset
