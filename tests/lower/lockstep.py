"""All devices of a Program in one process, instruction by instruction: what the runtime does, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moai.graph.placement import Partial, Placement, Shard, local_shape
from moai.graph.step_graph import Ref, Scalar, flat_ids, map_args
from moai.lower.operators import operator
from moai.lower.program import Instruction, PerRank, Program

Local = list[torch.Tensor]  # a tensor's part on every device


def spread(tensor: torch.Tensor, placement: Placement, n: int) -> Local:
    """The parts of `tensor` on `n` devices."""
    if isinstance(placement, Shard):
        return [part.clone() for part in tensor.split(placement.sizes, placement.dim)]
    if isinstance(placement, Partial):
        terms = [torch.randn(tensor.shape, dtype=tensor.dtype) for _ in range(n - 1)]
        return [*terms, tensor - sum(terms)]
    return [tensor.clone() for _ in range(n)]


def whole(parts: Local, placement: Placement) -> torch.Tensor:
    if isinstance(placement, Shard):
        return torch.cat(parts, placement.dim)
    if isinstance(placement, Partial):
        return torch.stack(parts).sum(0)
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0], rtol=0, atol=0, equal_nan=True)
    return parts[0]


def run_local(program: Program, inputs: Sequence[Local], scalars: Sequence[float] = ()) -> list[Local]:
    """The parts of the outputs, given those of the inputs. Buffers that were not donated must come back unchanged."""
    n = program.n_devices
    store: list[dict[int, Any]] = [{} for _ in range(n)]
    for slot, parts in zip(program.inputs, inputs, strict=True):
        for r in range(n):
            assert parts[r].shape == local_shape(slot.type.shape, slot.placement, r)
            store[r][slot.id] = parts[r]
    before = [[p.clone() for p in parts] for parts in inputs]
    for instruction in program.instructions:
        _step(instruction, store, scalars)
    for slot, parts, old in zip(program.inputs, inputs, before, strict=True):
        if not slot.donated:
            torch.testing.assert_close(parts, old, rtol=0, atol=0, equal_nan=True)
    for slot in program.outputs:
        for r in range(n):
            assert store[r][slot.id].shape == local_shape(slot.type.shape, slot.placement, r)
            assert store[r][slot.id].dtype == slot.type.dtype
    return [[store[r][slot.id] for r in range(n)] for slot in program.outputs]


def run(program: Program, inputs: Sequence[torch.Tensor], scalars: Sequence[float] = ()) -> list[torch.Tensor]:
    """The global outputs, given the global inputs."""
    parts = [spread(t, s.placement, program.n_devices) for t, s in zip(inputs, program.inputs, strict=True)]
    found = run_local(program, parts, scalars)
    return [whole(p, s.placement) for p, s in zip(found, program.outputs, strict=True)]


def _step(instruction: Instruction, store: list[dict[int, Any]], scalars: Sequence[float]) -> None:
    n = len(store)

    def resolved(args: Any, rank: int) -> Any:
        def leaf(value: Any) -> Any:
            if isinstance(value, Ref):
                return store[rank][value.id]
            if isinstance(value, Scalar):
                return scalars[value.index]
            return value.values[rank] if isinstance(value, PerRank) else value

        return map_args(args, leaf)

    args = [resolved(instruction.args, r) for r in range(n)]
    if instruction.op == "all_reduce":
        results = [sum(a[0] for a in args)] * n
        results = [r.clone() for r in results]
    elif instruction.op == "all_reduce_start":
        total = [sum(terms).clone() for terms in zip(*(a[0] for a in args), strict=True)]
        results = [[t.clone() for t in total] for _ in range(n)]
    elif instruction.op == "wait":
        results = [tuple(a[0]) for a in args]
    elif instruction.op == "all_gather":
        _, dim, sizes = args[0]
        assert [a[0].shape[dim] for a in args] == list(sizes)
        results = [torch.cat([a[0] for a in args], dim) for _ in range(n)]
    else:
        op = operator(instruction.op)
        results = [op(*args[r], **resolved(instruction.kwargs, r)) for r in range(n)]
    for r in range(n):
        if instruction.outs is not None:
            _bind(instruction, results[r], r, store)
        for id_ in instruction.frees:
            del store[r][id_]


def _bind(instruction: Instruction, result: Any, rank: int, store: list[dict[int, Any]]) -> None:
    def assign(outs: Any, values: Any) -> None:
        if isinstance(outs, int):
            store[rank][outs] = values
        elif outs is not None:
            for o, v in zip(outs, values, strict=True):
                assign(o, v)

    assign(instruction.outs, result)
    if instruction.op != "all_reduce_start":
        for id_, shape in zip(flat_ids(instruction.outs), instruction.shapes, strict=True):
            expected = tuple(s.values[rank] if isinstance(s, PerRank) else s for s in shape)
            assert tuple(store[rank][id_].shape) == expected, f"device {rank}: {instruction}"
