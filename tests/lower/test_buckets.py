"""Which collectives are joined, where a joined one starts, and where it is awaited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moai.graph.placement import Mesh, Placement, Shard
from moai.graph.step_graph import Ref, TensorType
from moai.lower import buckets
from moai.lower.buckets import bucketed
from moai.lower.program import Instruction
from moai.lower.values import Values

MESH = Mesh((("a", 2), ("b", 2)))
N = 64  # entries of a value
TERMS, PART = Placement((), ("a", "b")), Placement((Shard(0, ("a",), (N // 2, N // 2)),), ("b",))


def joined(
    code: Sequence[tuple[Any, ...]], states: Sequence[int] = (), large: Sequence[int] = (), **dtypes: torch.dtype
) -> list[str]:
    """The code, from (operator, argument, result, axes): joined collectives with what they are of."""
    values = Values((), MESH)
    for id_ in range(30):
        values.new(TensorType((N * 4096 if id_ in large else N,), dtypes.get(f"v{id_}", torch.float32)), TERMS)
    instructions = []
    for op, x, out, *axes in code:
        args: tuple[Any, ...] = (Ref(x),) if x is not None else ()
        if op == "all_reduce":
            args = (*args, (axes or ["a"])[0], "sum")
        elif op == "maximum":
            op, args = "all_reduce", (*args, ("a",), "max")
        elif op in ("reduce_scatter", "all_gather"):
            values.place(x if op == "all_gather" else out, PART)
            args = (*args, ("a",), 0, (N // 2, N // 2), 1)
        elif "." not in op and op not in ("repeat", "end_repeat", "accumulate"):
            op = f"aten.{op}.default"
        args = tuple((a,) if isinstance(a, str) and a in "ab" else a for a in args)
        instructions.append(Instruction(op, args, {}, out, (), () if out is None else ((N,),)))
    return [_text(i) for i in bucketed(instructions, values, states)]


def _text(i: Instruction) -> str:
    if i.op.endswith("_start"):
        return f"{i.op.removesuffix('_start')} {','.join(i.args[1])} of {','.join(str(r.id) for r in i.args[0])}"
    if i.op == "wait":
        return f"wait {','.join(map(str, i.outs))}"
    return f"{i.op.removeprefix('aten.').removesuffix('.default')} {i.outs}".removesuffix(" None")


def test_sums_are_joined_behind_the_last_term_and_awaited_before_the_first_use():
    code = [("neg", 0, 1), ("all_reduce", 1, 11), ("cos", 0, 2), ("all_reduce", 2, 12), ("sin", 0, 3), ("exp", 11, 4)]
    assert joined(code) == ["neg 1", "cos 2", "all_reduce a of 1,2", "sin 3", "wait 11,12", "exp 4"]


def test_a_sum_that_is_needed_before_another_is_ready_does_not_wait_for_it():
    code = [("neg", 0, 1), ("all_reduce", 1, 11), ("exp", 11, 2), ("all_reduce", 2, 12), ("sin", 12, 3)]
    assert joined(code) == ["neg 1", "all_reduce 11", "exp 2", "all_reduce 12", "sin 3"]


def test_a_sum_that_would_be_under_way_for_long_does_not_wait_for_one_that_is_needed_later():
    """A count of labels, that the backward needs, and a loss, that the end of the step needs."""
    forward, backward = ([("exp", 0, None)] * 40 for _ in range(2))
    code = [("neg", 0, 1), *forward, ("cos", 0, 2), ("all_reduce", 1, 11), ("sin", 11, 3), *backward]
    code += [("all_reduce", 2, 12), ("exp", 12, 4)]
    found = [line for line in joined(code) if line != "exp"]
    assert found == [
        *("neg 1", "all_reduce a of 1", "cos 2", "all_reduce a of 2"),
        *("wait 11", "sin 3", "wait 12", "exp 4"),
    ]


def test_a_small_term_that_is_there_first_waits_for_the_memory_of_its_bucket():
    """Not the memory, all the while, for the terms that it is for."""
    code = [("neg", 0, 1), *[("exp", 0, None)] * 40, ("cos", 0, 2), ("all_reduce", 1, 11), ("all_reduce", 2, 12)]
    found = [line for line in joined(code, large=[2, 12]) if line != "exp"]
    assert found == ["neg 1", "bucket (11, 12)", "cos 2", "copy_", "copy_", "all_reduce a of 11,12", "wait "]


def test_sums_of_different_types_are_not_joined():
    code = [("neg", 0, 1), ("cos", 0, 2), ("all_reduce", 1, 11), ("all_reduce", 2, 12)]
    assert joined(code, v2=torch.float64, v12=torch.float64)[2:] == ["all_reduce 11", "all_reduce 12"]


def test_sums_over_different_axes_are_not_joined():
    code = [("neg", 0, 1), ("cos", 0, 2), ("all_reduce", 1, 11, "a"), ("all_reduce", 2, 12, "b")]
    assert sorted(joined(code)[2:]) == ["all_reduce 11", "all_reduce 12"]


def test_a_maximum_is_joined_to_nothing():
    code = [("neg", 0, 1), ("cos", 0, 2), ("maximum", 1, 11), ("maximum", 2, 12)]
    assert joined(code) == ["neg 1", "cos 2", "all_reduce 11", "all_reduce 12"]


def test_sums_over_one_axis_that_follow_sums_over_another_are_joined_among_themselves():
    """What is scattered within groups of devices, and then summed over the groups."""
    code = [("neg", 0, 1), ("cos", 0, 2)]
    code += [("reduce_scatter", 1, 11), ("all_reduce", 11, 21, "b"), ("reduce_scatter", 2, 12)]
    code += [("all_reduce", 12, 22, "b"), ("exp", 21, 3), ("exp", 22, 4)]
    assert joined(code) == [
        "neg 1", "cos 2", "reduce_scatter a of 1,2", "wait 11,12", "all_reduce b of 11,12", "wait 21,22", "exp 3",
        "exp 4",
    ]  # fmt: skip


def test_nothing_is_joined_across_the_bounds_of_a_loop():
    code = [("neg", 0, 1), ("all_reduce", 1, 11), ("repeat", None, None), ("cos", 0, 2), ("all_reduce", 2, 12)]
    code += [("end_repeat", None, None), ("exp", 11, 3)]
    assert joined(code) == ["neg 1", "all_reduce 11", "repeat", "cos 2", "all_reduce 12", "end_repeat", "exp 3"]


ONE_BY_ONE = {"_SMALL": 0, "_MIN_BYTES": 1, "_BUCKETS": 1000}


def test_no_more_than_two_buckets_of_scattered_sums_are_under_way(monkeypatch):
    for name, value in ONE_BY_ONE.items():
        monkeypatch.setattr(buckets, name, value)
    code = [("reduce_scatter", k, 10 + k) for k in range(4)] + [("neg", 10 + k, 20 + k) for k in range(4)]
    assert joined(code)[:6] == [
        "reduce_scatter a of 0", "reduce_scatter a of 1", "wait 10", "reduce_scatter a of 2", "wait 11",
        "reduce_scatter a of 3",
    ]  # fmt: skip


def test_what_has_been_scattered_early_is_added_up_over_passes_at_once(monkeypatch):
    for name, value in ONE_BY_ONE.items():
        monkeypatch.setattr(buckets, name, value)
    code = [("neg", k, 5 + k) for k in range(3)] + [("reduce_scatter", 5 + k, 10 + k) for k in range(3)]
    code += [("accumulate", 10 + k, 20 + k) for k in range(3)]
    assert joined([("repeat", None, None), *code, ("end_repeat", None, None)]) == [
        "repeat", "neg 5", "reduce_scatter a of 5", "neg 6", "reduce_scatter a of 6", "neg 7", "wait 10",
        "accumulate 20", "reduce_scatter a of 7", "wait 11", "accumulate 21", "wait 12", "accumulate 22", "end_repeat",
    ]  # fmt: skip


def test_states_are_gathered_together_before_the_first_is_used():
    code = [("all_gather", 0, 11), ("neg", 11, 1), ("all_gather", 5, 12), ("neg", 12, 2)]
    assert joined(code, states=[0, 5]) == ["all_gather a of 0,5", "wait 11,12", "neg 1", "neg 2"]


def test_what_is_no_state_is_gathered_where_it_is_needed():
    code = [("cos", 0, 1), ("all_gather", 1, 11), ("neg", 11, 2), ("sin", 0, 3), ("all_gather", 3, 12), ("neg", 12, 4)]
    assert joined(code) == ["cos 1", "all_gather 11", "neg 2", "sin 3", "all_gather 12", "neg 4"]
