"""All devices of a Program in one process, instruction by instruction: what the runtime does, without a network.
Stages of a pipeline take turns: one goes on until it waits for a message.

In: global tensors (`run`) or every device's parts (`run_local`). Out: the same of the outputs. Nothing of the runtime
is used, so that the two can be held against each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from moai.graph.placement import STAGES, TIME, Mesh, Placement, Shard, local_shape
from moai.graph.step_graph import Ref, Scalar, flat_ids, map_args
from moai.lower.operators import operator
from moai.lower.program import Instruction, PerRank, Program, Slot

Local = list[torch.Tensor]  # a tensor's part on every device
At = Mapping[str, int]
Cut = tuple[int, tuple[int, ...], int]  # dim, sizes, blocks
# By sending and receiving stage, and device within it: all that was sent; what was received is None.
Mail = dict[tuple[int, int, int], list[list[torch.Tensor] | None]]


def run(program: Program, inputs: Sequence[torch.Tensor], scalars: Sequence[float] = ()) -> list[torch.Tensor]:
    """The global outputs, given the global inputs."""
    mesh = Mesh(tuple((name, size) for name, size in program.mesh.axes if name != STAGES))
    parts = [spread(t, s.placement, mesh) for t, s in zip(inputs, program.inputs, strict=True)]
    found = run_local(program, parts, scalars)
    return [whole(p, s.placement, mesh) for p, s in zip(found, program.outputs, strict=True)]


def run_local(program: Program, inputs: Sequence[Local], scalars: Sequence[float] = ()) -> list[Local]:
    """The parts of the outputs, given those of the inputs. Buffers that were not donated must come back unchanged."""
    mail: Mail = defaultdict(list)
    stages = [_Devices(program, s, scalars, mail) for s in range(program.mesh.n_stages)]
    before = [[p.clone() for p in parts] for parts in inputs]
    for slot, parts in zip(program.inputs, inputs, strict=True):
        for devices in stages:
            if slot.placement.on(devices.stage):  # each stage has its own copy of what several have
                devices.put(slot, parts if devices is stages[-1] else [p.clone() for p in parts])
    _run_in_turns(stages)
    assert all(m is None for sent in mail.values() for m in sent), "messages that nobody received"
    for slot, parts, old in zip(program.inputs, inputs, before, strict=True):
        if not slot.donated:
            torch.testing.assert_close(parts, old, rtol=0, atol=0, equal_nan=True)
    made = [iter(map(devices.get, devices.program.outputs)) for devices in stages]
    return [next(made[slot.placement.stages[0] if slot.placement.stages else 0]) for slot in program.outputs]


def _run_in_turns(stages: Sequence[_Devices]) -> None:
    running = [devices.run() for devices in stages]
    while running:
        done = sum(devices.done for devices in stages)
        running = [r for r in running if next(r, None) is not None]
        assert not running or sum(devices.done for devices in stages) > done, "all stages wait for each other"


def spread(tensor: torch.Tensor, placement: Placement, mesh: Mesh) -> Local:
    """Every device's part of `tensor`. Terms of a sum are random."""
    n_terms = mesh.count(placement.partial)
    terms = [torch.randn(tensor.shape).to(tensor.dtype) for _ in range(n_terms - 1)]
    terms.append(tensor - sum(terms) if terms else tensor)
    found = []
    for at in map(mesh.coordinates, range(mesh.n_devices // mesh.n_stages)):
        term = terms[mesh.index(placement.partial, at)]
        found.append(term[_positions(tensor.shape, placement, mesh, at)].clone())
    return found


def whole(parts: Local, placement: Placement, mesh: Mesh) -> torch.Tensor:
    """The tensor that lies on the devices as `parts`; devices that hold the same must do so bit for bit. `parts` are
    those of one stage."""
    shape = list(parts[0].shape)
    for shard in placement.shards:
        shape[shard.dim] = sum(shard.sizes) * shard.blocks
    found = parts[0].new_zeros(shape)
    first: dict[tuple[int, ...], int] = {}
    for rank, part in enumerate(parts):
        at = mesh.coordinates(rank)
        told_apart = tuple(at[a] for a in (*placement.split_axes, *placement.partial))
        if told_apart in first:
            torch.testing.assert_close(part, parts[first[told_apart]], rtol=0, atol=0, equal_nan=True)
            continue
        first[told_apart] = rank
        where = _positions(shape, placement, mesh, at)
        found[where] = found[where] + part if placement.partial else part
    return found


class _Arriving:
    """Sums on their way to where they are to lie."""

    def __init__(self, places: Sequence[torch.Tensor], sums: Sequence[torch.Tensor]) -> None:
        self._places, self._sums = places, sums

    def arrive(self) -> tuple[()]:
        for place, sum_ in zip(self._places, self._sums, strict=True):
            assert place.isnan().all(), "touched while it was summed"
            place.copy_(sum_)
        return ()


class _Devices:
    """The values of all devices of a stage, and the pass of the loop that they are in. Devices are numbered within
    the stage, on a mesh without stages. `done` instructions have been executed."""

    def __init__(self, program: Program, stage: int, scalars: Sequence[float], mail: Mail) -> None:
        self.program = program.of(stage)
        self.stage = stage
        self.mesh = Mesh(tuple((name, size) for name, size in program.mesh.axes if name != STAGES))
        self.scalars = scalars
        self.mail = mail
        self.done = 0
        self.step: int | None = None  # None: in no loop
        self.stores: list[dict[int, Any]] = [{} for _ in range(self.mesh.n_devices)]
        self.of_pass: set[int] = set()  # what this pass has defined and does not hand on

    def put(self, slot: Slot, parts: Local) -> None:
        for rank, part in enumerate(parts):
            self._check_slot(slot, part, rank)
            self.stores[rank][slot.id] = part

    def get(self, slot: Slot) -> Local:
        parts = [store[slot.id] for store in self.stores]
        for rank, part in enumerate(parts):
            self._check_slot(slot, part, rank)
        return parts

    def run(self) -> Iterator[bool]:
        """Comes back whenever a message has not arrived yet."""
        instructions = self.program.instructions
        begin: int | None = None
        for index, instruction in enumerate(instructions):
            if instruction.op == "repeat":
                assert begin is None, "a loop inside of a loop"
                begin = index
            elif instruction.op == "end_repeat":
                assert begin is not None, "the end of no loop"
                yield from self._run_loop(instructions[begin:index])
                begin = None
                for rank in range(self.mesh.n_devices):
                    self._free(instruction, rank)
            elif begin is None:
                yield from self._execute(instruction)
        assert begin is None, "a loop without an end"

    def _run_loop(self, code: Sequence[Instruction]) -> Iterator[bool]:
        begins = [at for at, i in enumerate(code) if i.op == "begin_part"] or [0]
        parts = [code[a + 1 : b] for a, b in pairwise([*begins, len(code)])]
        passes = [(part, step) for step in range(self.mesh.steps) for part in range(len(parts))]
        order = code[0].args[0] if code[0].args else passes
        assert sorted(order) == sorted(passes), "some part of a pass is not run once"
        for part, self.step in order:
            for instruction in parts[part]:
                yield from self._execute(instruction)
            self._end_pass()
        self.step = None

    def _end_pass(self) -> None:
        for store in self.stores:
            for id_ in self.of_pass:
                store.pop(id_, None)
        self.of_pass.clear()

    def _execute(self, instruction: Instruction) -> Iterator[bool]:
        ranks = range(self.mesh.n_devices)
        args = [self._resolved(instruction.args, r) for r in ranks]
        results: list[Any]
        if instruction.op == "send":
            results = [self._send(r, *args[r]) for r in ranks]
        elif instruction.op == "receive":
            while len(self.mail[args[0][0], self.stage, 0]) <= args[0][1]:
                yield True
            results = [self._received(r, *args[r]) for r in ranks]
        elif instruction.kwargs.get("in_place"):
            results = self._sum_in_place(args)
        elif instruction.op in _COLLECTIVES:
            results = self._collective(instruction.op, args)
        elif instruction.op == "bucket":
            results = [tuple(torch.full(shape, torch.nan, dtype=dtype) for shape in shapes) for shapes, dtype in args]
        elif instruction.op in ("accumulate", "collect"):
            assert self.step is not None, f"{instruction} outside of a loop"
            handed_on = _accumulate if instruction.op == "accumulate" else _collect
            last = [store.get(instruction.outs) for store in self.stores]
            results = [handed_on(last[r], *args[r]) for r in ranks]
        elif instruction.op == "take":
            assert self.step is not None, f"{instruction} outside of a loop"
            results = [_taken(a[0], self.step) for a in args]
        elif instruction.op == "join":
            assert self.step is None, f"{instruction} inside of a loop"
            results = [torch.cat([_taken(entries, i) for i in range(self.mesh.steps)], dim) for entries, dim in args]
        else:
            op = operator(instruction.op)
            results = [op(*args[r], **self._resolved(instruction.kwargs, r)) for r in ranks]
        for r in ranks:
            self._bind(instruction, results[r], r)
            self._free(instruction, r)
        self.done += 1

    def _send(self, rank: int, xs: Sequence[torch.Tensor], stage: int) -> None:
        assert len({x.dtype for x in xs}) == 1 and stage != self.stage
        self.mail[self.stage, stage, rank].append([x.clone() for x in xs])

    def _received(
        self, rank: int, stage: int, nth: int, shapes: Sequence[Any], dtype: torch.dtype
    ) -> tuple[torch.Tensor, ...]:
        message, self.mail[stage, self.stage, rank][nth] = self.mail[stage, self.stage, rank][nth], None
        assert message is not None, "a message is received twice"
        assert [(x.shape, x.dtype) for x in message] == [(torch.Size(s), dtype) for s in shapes]
        return tuple(message)

    def _resolved(self, args: Any, rank: int) -> Any:
        def leaf(value: Any) -> Any:
            if isinstance(value, Ref):
                return self.stores[rank][value.id]
            if isinstance(value, Scalar):
                return self.scalars[value.index]
            return self._number(value, rank)

        return map_args(args, leaf)

    def _number(self, value: Any, rank: int) -> Any:
        if not isinstance(value, PerRank):
            return value
        assert len(value.values) == self.mesh.count(value.axes), f"{value} on mesh ({self.mesh})"
        steps = range(self.mesh.steps) if self.step is None else [self.step]
        found = {value.values[self.mesh.index(value.axes, self.mesh.coordinates(rank, i))] for i in steps}
        assert len(found) == 1, f"{value} depends on the pass, outside of a loop"
        return found.pop()

    def _collective(self, op: str, args: list[Any]) -> list[Any]:
        if op == "wait":
            return [a[0].arrive() if isinstance(a[0], _Arriving) else tuple(a[0]) for a in args]
        xs, (axes, *how) = [a[0] for a in args], args[0][1:]
        for a in args:
            assert a[1:] == args[0][1:], f"devices issue different {op}: {a[1:]} and {args[0][1:]}"
        assert TIME not in axes
        groups = [self.mesh.group(axes, r) for r in range(self.mesh.n_devices)]
        if not op.endswith("_start"):
            cut = tuple(how)
            return [_combined(op, [xs[p] for p in g], g.index(r), cut) for r, g in enumerate(groups)]
        op = op.removesuffix("_start")
        for tensors in xs:
            assert len({x.dtype for x in tensors}) == 1, f"several dtypes in one {op}"
        cuts = how[0] if how else [("sum",)] * len(xs[0])
        assert len(cuts) == len(xs[0])
        return [
            [_combined(op, [xs[p][i] for p in g], g.index(r), cut) for i, cut in enumerate(cuts)]
            for r, g in enumerate(groups)
        ]

    def _sum_in_place(self, args: list[Any]) -> list[_Arriving]:
        """The terms are gone from the start on, and the sums are there from the wait on."""
        sums = self._collective("all_reduce_start", args)
        found = [_Arriving(a[0], s) for a, s in zip(args, sums, strict=True)]
        for a in args:
            for x in a[0]:
                x.fill_(torch.nan)
        return found

    def _bind(self, instruction: Instruction, result: Any, rank: int) -> None:
        def assign(outs: Any, values: Any) -> None:
            if isinstance(outs, int):
                self.stores[rank][outs] = values
                if self.step is not None and instruction.op not in ("accumulate", "collect"):
                    self.of_pass.add(outs)
            elif outs is not None:
                for o, v in zip(outs, values, strict=True):
                    assign(o, v)

        if instruction.outs is None:
            return
        assign(instruction.outs, result)
        if not instruction.shapes:
            return
        for id_, shape in zip(flat_ids(instruction.outs), instruction.shapes, strict=True):
            expected = tuple(self._number(s, rank) for s in shape)
            actual = tuple(self.stores[rank][id_].shape)
            assert actual == expected, f"device {rank}: {actual} is not {expected}: {instruction}"

    def _free(self, instruction: Instruction, rank: int) -> None:
        for id_ in instruction.frees:
            ours = self.step is None or id_ in self.of_pass
            assert ours, f"%{id_} is freed in a loop, but was not defined in this pass: {instruction}"
            del self.stores[rank][id_]

    def _check_slot(self, slot: Slot, part: torch.Tensor, rank: int) -> None:
        expected = local_shape(slot.type.shape, slot.placement, self.mesh, self.mesh.coordinates(rank))
        assert tuple(part.shape) == expected, f"device {rank}: {tuple(part.shape)} is not {expected}: {slot}"
        assert part.dtype == slot.type.dtype, f"device {rank}: {part.dtype}: {slot}"


# Handing on from pass to pass. An entry of a list is kept with a copy, which tells whether something overwrote it.


def _accumulate(total: torch.Tensor | None, x: torch.Tensor, owned: bool) -> torch.Tensor:
    if total is None:
        return x if owned else x.clone()
    assert total.shape == x.shape and total.dtype == x.dtype
    return total.add_(x)


def _collect(entries: list[Any] | None, x: torch.Tensor) -> list[Any]:
    return [*(entries or []), (x, x.clone())]


def _taken(entries: list[Any], step: int) -> torch.Tensor:
    x, copy = entries[step]
    entries[step] = None
    torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True, msg="a collected tensor was overwritten")
    return x


# Collectives.

_COLLECTIVES = frozenset(
    {
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_reduce_start",
        "all_gather_start",
        "reduce_scatter_start",
        "wait",
    }
)


def _combined(op: str, parts: Local, index: int, how: tuple[Any, ...]) -> torch.Tensor:
    """What the device at `index` gets of the peers' `parts`."""
    if op == "all_reduce":
        return _reduced(parts, *how)
    if op == "all_gather":
        return _gathered(parts, *how)
    dim, sizes, blocks = how
    assert len(sizes) == len(parts)
    return _reduced(parts, "sum").index_select(dim, _held((dim, sizes, blocks), index))


def _reduced(parts: Local, kind: str) -> torch.Tensor:
    assert len({(p.shape, p.dtype) for p in parts}) == 1 and parts[0].dtype != torch.bool
    stacked = torch.stack(parts)
    if kind == "max":
        return stacked.amax(0)
    assert kind == "sum"
    return stacked.sum(0, dtype=parts[0].dtype)


def _gathered(parts: Local, dim: int, sizes: tuple[int, ...], blocks: int) -> torch.Tensor:
    assert [p.shape[dim] for p in parts] == [size * blocks for size in sizes]
    shape = list(parts[0].shape)
    shape[dim] = sum(sizes) * blocks
    found = parts[0].new_empty(shape)
    for index, part in enumerate(parts):
        found.index_copy_(dim, _held((dim, sizes, blocks), index), part)
    return found


def _held(cut: Cut, index: int) -> torch.Tensor:
    """The positions along the dim that part `index` holds."""
    _, sizes, blocks = cut
    start = sum(sizes[:index])
    run = torch.arange(start, start + sizes[index])
    return torch.cat([run + block * sum(sizes) for block in range(blocks)])


def _positions(shape: Sequence[int], placement: Placement, mesh: Mesh, at: At) -> Any:
    """The index of a global tensor that selects the part at coordinate `at`."""
    shards: dict[int, Shard] = {s.dim: s for s in placement.shards}
    if not shards:
        return ...
    held = []
    for dim, length in enumerate(shape):
        shard = shards.get(dim)
        if shard is None:
            held.append(torch.arange(length))
            continue
        assert sum(shard.sizes) * shard.blocks == length and len(shard.sizes) == mesh.count(shard.axes)
        held.append(_held((dim, shard.sizes, shard.blocks), mesh.index(shard.axes, at)))
    return torch.meshgrid(*held, indexing="ij")
