"""Reductions run in the background, many at a time.

In: instructions in which every sum over devices is an all_reduce of its own, placed where its result is first needed.
Out: the same with reductions joined: each bucket starts right behind its last term and is awaited right before its
first use. A reduction that nothing can be joined to, and that is small, stays a plain all_reduce.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from moai.graph.step_graph import Ref, flat_ids
from moai.lower.cleanup import uses
from moai.lower.program import Instruction
from moai.lower.values import Values

# Below the lower bound, latency dominates; above the upper one, the reduction of the last bucket is not hidden.
_MIN_BYTES, _MAX_BYTES = 4 << 20, 25 << 20
# About so many buckets a step: what remains to be awaited after the last gradient is one of them.
_BUCKETS = 4
_SMALL = 4096


@dataclass
class _Bucket:
    """Reductions to be joined. `ready`: position of the last term's instruction; `due`: of the first use."""

    members: list[Instruction] = field(default_factory=list)
    ready: int = -1
    due: int = 0
    bytes: int = 0

    def takes(self, ready: int, due: int, nbytes: int) -> bool:
        """Whether a sum can join without being late for anyone."""
        return max(self.ready, ready) < min(self.due, due) and self.bytes + nbytes <= _MAX_BYTES

    def join(self, member: Instruction, ready: int, due: int, nbytes: int) -> None:
        self.due = min(self.due, due) if self.members else due
        self.ready = max(self.ready, ready)
        self.bytes += nbytes
        self.members.append(member)


def bucketed(code: Sequence[Instruction], values: Values) -> list[Instruction]:
    sums = [i for i in code if i.op == "all_reduce"]
    rest = [i for i in code if i.op != "all_reduce"]
    made = {o: at for at, i in enumerate(rest) for o in flat_ids(i.outs)}
    first_use: dict[int, int] = {}
    for at, instruction in enumerate(rest):
        for id_ in uses(instruction):
            first_use.setdefault(id_, at)

    before: dict[int, list[Instruction]] = defaultdict(list)
    after: dict[int, list[Instruction]] = defaultdict(list)
    for bucket in _fill(sums, made, first_use, len(rest), values):
        start, wait = _emitted(bucket, values)
        if start is not None:
            after[bucket.ready].append(start)
        before[bucket.due].append(wait)
    out = list(after[-1])
    for at, instruction in enumerate(rest):
        out += (*before[at], instruction, *after[at])
    return out + before[len(rest)]


def _fill(
    sums: Sequence[Instruction], made: dict[int, int], first_use: dict[int, int], end: int, values: Values
) -> list[_Bucket]:
    def ready(i: Instruction) -> int:
        return made.get(i.args[0].id, -1)

    total = sum(values.types[i.outs].nbytes for i in sums)
    enough = min(max(total // _BUCKETS, _MIN_BYTES), _MAX_BYTES)
    full: list[_Bucket] = []
    filling: dict[object, _Bucket] = {}  # by dtype
    for member in sorted(sums, key=ready):
        type_ = values.types[member.outs]
        at, due = ready(member), first_use.get(member.outs, end)
        bucket = filling.get(type_.dtype)
        if bucket is None or not bucket.takes(at, due, type_.nbytes) or bucket.bytes >= enough:
            bucket = filling[type_.dtype] = _Bucket()
            full.append(bucket)
        bucket.join(member, at, due, type_.nbytes)
    return full


def _emitted(bucket: _Bucket, values: Values) -> tuple[Instruction | None, Instruction]:
    """The instruction that starts the bucket's reduction (None: it needs no start), and the one that gives the sums."""
    members = bucket.members
    where = members[-1].where
    if len(members) == 1 and values.types[members[0].outs].numel <= _SMALL:
        return None, members[0]
    handle = values.new()
    terms = tuple(Ref(m.args[0].id) for m in members)
    sums = tuple(m.outs for m in members)
    shapes = tuple(s for m in members for s in m.shapes)
    start = Instruction("all_reduce_start", (terms,), {}, handle, (), (), where)
    return start, Instruction("wait", (Ref(handle),), {}, sums, (), shapes, where)
