"""Collectives run in the background, many at a time.

In: instructions in which every sum over devices, and every gathering of a state, is a collective of its own, placed
where its result is first needed. Out: the same with collectives joined. A bucket of sums starts right behind its last
term and is awaited right before its first use; a bucket of gathered states starts where the bucket before it is first
used, so that at most two are under way. So are two buckets of sums that are scattered, which are copied to be sent: a
third one waits for the first. One that nothing can be joined to, that is small, and that is needed as soon as it is
there, stays as it is.

Terms of a large sum are written into the bucket's memory right where they are made, and become the sum in place.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from moai.graph.step_graph import Ref, flat_ids
from moai.lower.cleanup import uses
from moai.lower.operators import BOUNDS
from moai.lower.program import Instruction
from moai.lower.repeats import apart
from moai.lower.values import Values

# Below the lower bound, latency dominates; above the upper one, the reduction of the last bucket is not hidden.
_MIN_BYTES, _MAX_BYTES = 4 << 20, 25 << 20
# Whole layers are joined until there are so many.
WHOLE_BYTES = 8 << 20
# About so many buckets a step: what remains to be awaited after the last gradient is one of them.
_BUCKETS = 4
_GATHERED_BUCKETS, _MIN_GATHERED = 16, 256 << 10
# Of a model with layers: what is repeated so often is a layer, which is gathered in about so many pieces.
_LAYERS, _PIECES = 3, 2
# A layer smaller than this is none.
_MIN_LAYER = 16 << 10
_SMALL = 4096
# So many instructions take longer than a small message.
_FAR = 32
# A message of so many bytes is worth to be put together where its terms are made. Of one that several layers are joined
# to, a layer's bytes decide: how many layers there are is to make no difference.
_WORTH_IT, _LAYER_WORTH_IT = 1 << 20, 16 << 10

# Buckets of scattered sums that are under way together: while one is sent, the next is filled.
_UNDER_WAY = 2

_COPY = "aten.copy_.default"

_SUMS = frozenset({"all_reduce", "reduce_scatter"})


@dataclass(frozen=True, slots=True)
class _Timed:
    """A collective. `ready`: position of the instruction that makes its term; `due`: of the first use."""

    instruction: Instruction
    ready: int
    due: int
    nbytes: int


@dataclass
class _Bucket:
    """Collectives to be joined."""

    members: list[_Timed] = field(default_factory=list)
    ready: int = -1
    due: int = 0
    bytes: int = 0
    slack: int = 0  # the least that a member has by itself: what is done while it is under way
    layers: set[int] = field(default_factory=set)
    is_large: bool = False  # whether it is worth to be put together where its terms are made

    def takes(self, member: _Timed) -> bool:
        """Whether a sum can join without being late for anyone, and without having all wait that would not."""
        fits = self.bytes + member.nbytes <= _MAX_BYTES
        slack = min(self.due, member.due) - max(self.ready, member.ready)
        return fits and (slack >= _FAR or (slack > 0 and min(self.slack, member.due - member.ready) < _FAR))

    def join(self, member: _Timed, layer: int) -> None:
        slack = member.due - member.ready
        self.layers.add(layer)
        self.slack = min(self.slack, slack) if self.members else slack
        self.due = min(self.due, member.due) if self.members else member.due
        self.ready = max(self.ready, member.ready)
        self.bytes += member.nbytes
        self.members.append(member)


def bucketed(code: Sequence[Instruction], values: Values, states: Collection[int]) -> list[Instruction]:
    """`states`: values that exist from the start, or are casts of such: they can be gathered ahead of time."""
    out: list[Instruction] = []
    part: list[Instruction] = []
    for instruction in code:
        if instruction.op in BOUNDS:
            out += (*_bucketed(part, values, states), instruction)
            part = []
        else:
            part.append(instruction)
    return out + _bucketed(part, values, states)


def _bucketed(code: Sequence[Instruction], values: Values, states: Collection[int]) -> list[Instruction]:
    """A part of a program without loops, one kind of collective after the other: one may need another's result."""

    def kind(i: Instruction) -> tuple[str, tuple[str, ...]] | None:
        joins = i.args[0].id in states if i.op == "all_gather" else i.op in _SUMS and "max" not in i.args
        return (i.op, i.args[1]) if joins else None

    found = list(code)
    for wanted in dict.fromkeys(map(kind, code)):
        if wanted is not None:
            chosen = [i for i in found if kind(i) == wanted]
            rest = [i for i in found if kind(i) != wanted]
            found = _joined(chosen, rest, values)
    return found


def _joined(chosen: Sequence[Instruction], rest: Sequence[Instruction], values: Values) -> list[Instruction]:
    made = {o: at for at, i in enumerate(rest) for o in flat_ids(i.outs)}
    first_use: dict[int, int] = {}
    for at, instruction in enumerate(rest):
        for id_ in uses(instruction):
            first_use.setdefault(id_, at)
    timed = [
        _Timed(i, made.get(i.args[0].id, -1), first_use.get(i.outs, len(rest)), values.types[i.outs].nbytes)
        for i in chosen
    ]
    buckets = _ahead(timed, values) if chosen[0].op == "all_gather" else _fill(timed, values)
    before: dict[int, list[Instruction]] = defaultdict(list)
    after: dict[int, list[Instruction]] = defaultdict(list)
    instead: dict[int, list[Instruction]] = {}
    readers = Counter(i for instruction in (*rest, *chosen) for i in uses(instruction))
    added = {i.args[0].id: at for at, i in enumerate(rest) if i.op == "accumulate"}
    under_way: deque[tuple[_Bucket, Instruction]] = deque()
    for bucket in buckets:
        start: Instruction | None
        if _is_written_in_place(bucket, readers, values):
            start, wait = _written_in_place(bucket, rest, before, instead, values)
        else:
            start, wait = _emitted(bucket, values)
        if start is None or start.op != "reduce_scatter_start":
            before[bucket.due].append(wait)
        else:
            if len(under_way) == _UNDER_WAY:
                earlier, its_wait = under_way.popleft()
                if earlier.due <= bucket.ready:
                    before[earlier.due].append(its_wait)
                else:
                    after[bucket.ready] += _with_additions(its_wait, rest, added, instead)
            under_way.append((bucket, wait))
        if start is not None:
            after[bucket.ready].append(start)
    for bucket, wait in under_way:
        before[bucket.due].append(wait)
    out = list(after[-1])
    for at, instruction in enumerate(rest):
        out += (*before[at], *instead.get(at, (instruction,)), *after[at])
    return out + before[len(rest)]


def _with_additions(
    wait: Instruction,
    rest: Sequence[Instruction],
    added: Mapping[int, int],
    instead: dict[int, list[Instruction]],
) -> list[Instruction]:
    """`wait`, and what adds its results up over passes: these would else be held until the end of the pass. `added`:
    where that is done, by value."""
    found = [wait]
    for at in (added[o] for o in wait.outs if o in added):
        found.append(rest[at])
        instead[at] = []
    return found


def _is_written_in_place(bucket: _Bucket, readers: Counter[int], values: Values) -> bool:
    """Whether the terms are to be made in the bucket, and can be: all are made in this part of the program, for this
    sum alone."""
    first = bucket.members[0].instruction
    wide = values.types[first.outs].dtype in (torch.float32, torch.float64)
    return (
        first.op == "all_reduce"
        and wide
        and bucket.is_large
        and all(m.ready >= 0 and readers[m.instruction.args[0].id] == 1 for m in bucket.members)
    )


def _written_in_place(
    bucket: _Bucket,
    rest: Sequence[Instruction],
    before: dict[int, list[Instruction]],
    instead: dict[int, list[Instruction]],
    values: Values,
) -> tuple[Instruction, Instruction]:
    """The start and the wait of a sum whose terms are made where their sum will be. `before` gets the bucket's memory,
    `instead` what takes the place of the terms' instructions."""
    members = [m.instruction for m in bucket.members]
    sums = tuple(m.outs for m in members)
    where = members[-1].where
    shapes = tuple(values.local_shape(o) for o in sums)
    memory = Instruction("bucket", (shapes, values.types[sums[0]].dtype), {}, sums, (), shapes, where)
    # A loss is there before large gradients are: it waits for the memory, and not the other way round.
    large = [m.ready for m in bucket.members if values.types[m.instruction.outs].numel > _SMALL]
    begin = min(large, default=min(m.ready for m in bucket.members))
    before[begin].append(memory)
    for timed in bucket.members:
        written = max(timed.ready, begin)
        made = instead.setdefault(written, [rest[written]])
        term, target = timed.instruction.args[0].id, Ref(timed.instruction.outs)
        at = next((k for k, i in enumerate(made) if term in flat_ids(i.outs)), None)
        source = rest[timed.ready] if at is None else made[at]
        if at is not None and source.op == "aten.mm.default":
            made[at] = replace(source, op="aten.mm.out", kwargs={"out": target}, outs=None, shapes=())
        elif at is not None and source.op == "aten._to_copy.default":
            made[at] = Instruction(_COPY, (target, source.args[0]), {}, None, (), (), source.where)
        else:
            made.append(Instruction(_COPY, (target, Ref(term)), {}, None, (), (), source.where))
    handle = values.new()
    terms = tuple(map(Ref, sums))
    start = Instruction("all_reduce_start", (terms, members[0].args[1]), {"in_place": True}, handle, (), (), where)
    return start, Instruction("wait", (Ref(handle),), {}, (), (), (), where)


def _fill(sums: Sequence[_Timed], values: Values) -> list[_Bucket]:
    """Sums in the order in which they can begin. Buckets hold whole layers, as few as are worth a message."""
    ordered = sorted(sums, key=lambda s: s.ready)
    begins, layer = _layers(ordered, values)
    total = sum(s.nbytes for s in sums)
    enough = _MAX_BYTES if begins else min(max(total // _BUCKETS, _MIN_BYTES), _MAX_BYTES)
    full = _cut(ordered, values, begins, WHOLE_BYTES, enough)
    for bucket in full:
        bucket.is_large = layer >= _LAYER_WORTH_IT if len(bucket.layers) > 1 else bucket.bytes >= _WORTH_IT
    return sorted(full, key=lambda bucket: bucket.ready)


def _ahead(gathers: Sequence[_Timed], values: Values) -> list[_Bucket]:
    """States by the order of their first use; each bucket starts where the one before it is awaited.

    Two buckets are on the device at a time, which is what spreading the states was to avoid: they are kept small, and
    hold of one layer at most.
    """
    ordered = sorted(gathers, key=lambda g: g.due)
    begins, layer = _layers(ordered, values)
    piece = layer // _PIECES if begins else sum(g.nbytes for g in gathers) // _GATHERED_BUCKETS
    full = _cut(ordered, values, begins, _MIN_LAYER, min(max(piece, _MIN_GATHERED), _MAX_BYTES))
    previous = -1
    for bucket in full:
        bucket.ready, previous = max(bucket.ready, min(previous, bucket.due - 1)), bucket.due
    return full


def _layers(members: Sequence[_Timed], values: Values) -> tuple[set[int], int]:
    """Where layers begin, and the bytes of the largest one: buckets that keep to them are the same for each layer,
    whatever their number."""
    sizes = [(m.nbytes, values.types[m.instruction.outs].dtype) for m in members]
    found = apart(sizes, _LAYERS)
    begins = {at for s in found for at in range(s.start, s.end + 1, s.period)}
    return begins, max((sum(m.nbytes for m in members[s.start : s.start + s.period]) for s in found), default=0)


def _cut(members: Sequence[_Timed], values: Values, begins: Collection[int], least: int, enough: int) -> list[_Bucket]:
    """Buckets of `enough` bytes, or of `least` where a layer begins."""
    full: list[_Bucket] = []
    filling: dict[object, _Bucket] = {}  # by dtype
    layer = 0
    for at, member in enumerate(members):
        dtype = values.types[member.instruction.outs].dtype
        if at in begins:
            filling = {d: bucket for d, bucket in filling.items() if bucket.bytes < least}
            layer += 1
        bucket = filling.get(dtype)
        if bucket is None or not bucket.takes(member) or bucket.bytes >= enough:
            bucket = filling[dtype] = _Bucket()
            full.append(bucket)
        bucket.join(member, layer)
    return full


def _emitted(bucket: _Bucket, values: Values) -> tuple[Instruction | None, Instruction]:
    """The instruction that starts the bucket's collective (None: it needs no start), and the one with the results."""
    members = [m.instruction for m in bucket.members]
    first, where = members[0], members[-1].where
    if len(members) == 1 and values.types[first.outs].numel <= _SMALL and bucket.due - bucket.ready < _FAR:
        return None, first
    handle = values.new()
    terms = tuple(Ref(m.args[0].id) for m in members)
    cuts = () if first.op == "all_reduce" else (tuple(m.args[2:] for m in members),)
    shapes = tuple(s for m in members for s in m.shapes)
    start = Instruction(f"{first.op}_start", (terms, first.args[1], *cuts), {}, handle, (), (), where)
    return start, Instruction("wait", (Ref(handle),), {}, tuple(m.outs for m in members), (), shapes, where)
