"""An executor runs one device's part of a program."""

import gc
import time
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch

from moai.graph.placement import Mesh
from moai.graph.step_graph import Ref, Scalar, TensorType
from moai.lower.program import PerRank, Program
from moai.runtime.clock import Clock
from moai.runtime.executor import Executor, InstructionError
from tests.runtime.programs import each, f32, mesh, op, program, slot, split

CPU = torch.device("cpu")


class Lookout:
    """A network whose all_reduce only looks, at what is alive in the middle of a program."""

    def __init__(self, look: Callable[[torch.Tensor, str], None]) -> None:
        self._look = look

    def over(self, mesh: Mesh, axes: Sequence[str]) -> "Lookout":
        return self

    def all_reduce(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        gc.collect(1)  # what is young
        self._look(x, kind)
        return x.clone()


def executor(p: Program, rank: int = 0) -> Executor:
    return Executor(p, rank, CPU, None)


def both_ways(p: Program, *inputs: torch.Tensor, scalars=(), rank: int = 0) -> list[torch.Tensor]:
    """The outputs of the second, generated run, which must be those of the first, interpreted one."""
    e = executor(p, rank)
    first = e.run([x.clone() for x in inputs], scalars)
    second = e.run([x.clone() for x in inputs], scalars)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return second


def test_runs_instructions_in_order() -> None:
    p = program(
        1,
        [slot(0, f32(2, 3)), slot(1, f32(3, 2))],
        [slot(3, f32(2, 2))],
        op("aten.mm.default", Ref(0), Ref(1), outs=2, shapes=((2, 2),)),
        op("aten.add.Tensor", Ref(2), Ref(2), outs=3, alpha=2, frees=(2,)),
    )
    a, b = torch.randn(2, 3), torch.randn(3, 2)
    assert torch.equal(both_ways(p, a, b)[0], a @ b + 2 * (a @ b))


def test_scalars_are_those_of_the_run() -> None:
    p = program(1, [slot(0, f32(2))], [slot(1, f32(2))], op("aten.mul.Scalar", Ref(0), Scalar(1), outs=1), n_scalars=2)
    e = executor(p)
    for factor in (2.0, 3.0, 4):
        assert e.run([torch.ones(2)], [9.0, factor])[0].tolist() == [factor, factor]


def test_every_device_takes_its_own_number() -> None:
    p = program(2, [], [slot(0, f32(5), split(0, (3, 2)))], op("aten.full.default", (each(3, 2),), 1.0, outs=0))
    assert [len(both_ways(p, rank=rank)[0]) for rank in (0, 1)] == [3, 2]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), -0.0, 0.1, 5e-324, 2**53])
def test_constants_arrive_exactly(value: float) -> None:
    full = op("aten.full.default", (), value, outs=0, dtype=torch.float64)
    p = program(1, [], [slot(0, TensorType((), torch.float64))], full)
    assert str(both_ways(p)[0].item()) == str(float(value))


def test_outputs_of_an_operator_may_be_nested_absent_or_lists() -> None:
    norm = op("aten.native_layer_norm.default", Ref(0), (4,), None, None, 1e-5, outs=(1, None, None))
    split = op("aten.split.Tensor", Ref(1), 2, outs=(2, 3))
    total = op("aten._foreach_add.List", (Ref(2), Ref(3)), (Ref(3), Ref(2)), outs=(4, 5), frees=(2, 3))
    p = program(1, [slot(0, f32(4, 4))], [slot(4, f32(2, 4)), slot(5, f32(2, 4))], norm, split, total)
    x = torch.randn(4, 4)
    expected = torch.nn.functional.layer_norm(x, (4,))
    assert torch.equal(both_ways(p, x)[0], expected[:2] + expected[2:])


def test_operators_without_results_write_in_place() -> None:
    x = slot(0, f32(2), donated=True)
    p = program(1, [x], [slot(0, f32(2), replaces=0)], op("aten._foreach_add_.Scalar", (Ref(0),), 1.0))
    e, tensor = executor(p), torch.zeros(2)
    for n in (1, 2, 3):
        (out,) = e.run([tensor], [])
        assert out is tensor and out.tolist() == [n, n]


def test_random_rows_do_not_depend_on_the_split() -> None:
    def draw(sizes: tuple[int, ...], rank: int) -> torch.Tensor:
        starts = tuple(sum(sizes[:r]) for r in range(len(sizes)))
        size = (each(*sizes), 2)
        rows = op("moai.random.default", size, "normal", 0.0, 1.0, 7, each(*starts), torch.float32, outs=0)
        return both_ways(program(len(sizes), [], [slot(0, f32(4, 2), split(0, sizes))], rows), rank=rank)[0]

    assert torch.equal(draw((4,), 0), torch.cat([draw((1, 3), 0), draw((1, 3), 1)]))


def test_inputs_are_freed_at_their_last_use() -> None:
    died: list[bool] = []

    def look(x: torch.Tensor, kind: str) -> None:
        died.append(gone() is None)

    p = program(
        1,
        [slot(0, f32(4), donated=True)],
        [slot(2, f32(4))],
        op("aten.neg.default", Ref(0), outs=1, frees=(0,)),
        op("all_reduce", Ref(1), ("dp",), "sum", outs=2, frees=(1,)),
    )
    e = Executor(p, 0, CPU, Lookout(look))
    for _ in range(2):
        inputs = [torch.ones(4)]
        gone = weakref.ref(inputs[0])
        e.run(inputs, [])
    assert died == [True, True]


def test_an_output_shares_no_memory_with_a_kept_input() -> None:
    p = program(1, [slot(0, f32(2, 2))], [slot(1, f32(4))], op("aten.view.default", Ref(0), (4,), outs=1))
    x = torch.zeros(2, 2)
    e = executor(p)
    for _ in range(2):
        e.run([x], [])[0].fill_(1)
    assert x.sum() == 0


def test_outputs_share_no_memory_with_each_other() -> None:
    x = slot(0, f32(4), donated=True)
    p = program(
        1, [x], [slot(0, f32(4), replaces=0), slot(1, f32(2, 2))], op("aten.view.default", Ref(0), (2, 2), outs=1)
    )
    e = executor(p)
    for _ in range(2):
        first, second = e.run([torch.zeros(4)], [])
        second.fill_(1)
        assert first.sum() == 0


def test_an_output_does_not_keep_a_larger_tensor_alive() -> None:
    make = op("aten.zeros.default", (1000,), outs=0)
    cut = op("aten.slice.Tensor", Ref(0), 0, 0, 2, outs=1, frees=(0,))
    assert both_ways(program(1, [], [slot(1, f32(2))], make, cut))[0].untyped_storage().nbytes() == 8


def test_a_wrong_local_shape_is_named_at_the_first_run() -> None:
    wrong = op("aten.neg.default", Ref(0), outs=1, shapes=((each(3, 4),),), where="train.py:12")
    p = program(2, [slot(0, f32(6), split(0, (3, 3)))], [slot(1, f32(7), split(0, (3, 4)))], wrong)
    executor(p, rank=0).run([torch.ones(3)], [])
    with pytest.raises(InstructionError, match=r"aten.neg.default .*train.py:12.* gave %1 the shape \[3\] where \[4\]"):
        executor(p, rank=1).run([torch.ones(3)], [])


@pytest.mark.parametrize("runs_before", [0, 1])
def test_a_failing_operator_is_named_with_its_line_and_operands(runs_before: int) -> None:
    check = op("aten._assert_async.msg", Ref(1), "no more", where="train.py:33")
    p = program(1, [slot(0, f32(2))], [], op("aten.all.default", Ref(0), outs=1), check)
    e = executor(p)
    for _ in range(runs_before):
        e.run([torch.ones(2)], [])
    message = (
        r"_assert_async.msg \(instruction 1 of .*, from train.py:33\) failed on \(bool\[\]\): RuntimeError: no more"
    )
    with pytest.raises(InstructionError, match=message):
        e.run([torch.zeros(2)], [])


def test_an_input_of_the_wrong_shape_is_refused() -> None:
    p = program(1, [slot(0, f32(2))], [slot(0, f32(2))])
    with pytest.raises(RuntimeError, match=r"input %0 .* local shape \[2\], but is torch.float32 \[3\]"):
        executor(p).run([torch.ones(3)], [])


def test_an_output_of_another_dtype_than_planned_is_refused_at_every_run() -> None:
    full = op("aten.full.default", (), Scalar(0), outs=0)
    e = executor(program(1, [], [slot(0, f32())], full, n_scalars=1))
    e.run([], [1.0])
    with pytest.raises(RuntimeError, match=r"output %0 .* should be torch.float32 .* but is torch.int64"):
        e.run([], [1])


def test_an_unknown_operator_is_refused_when_the_program_is_loaded() -> None:
    p = program(1, [], [], op("aten.frobnicate.default", where="train.py:5"))
    with pytest.raises(RuntimeError, match=r"no operator aten.frobnicate.default \(from train.py:5\)"):
        executor(p)


def test_peers_that_are_gone_when_a_program_is_loaded_are_not_this_devices_fault() -> None:
    class Broken:
        def over(self, mesh: Mesh, axes: Sequence[str]) -> Lookout:
            raise ConnectionError("reset by peer")

    p = program(2, [slot(0, f32())], [], op("all_reduce", Ref(0), ("dp",), "sum", outs=1))
    with pytest.raises(InstructionError, match=r"program .* cannot meet its peers over dp: reset by peer") as raised:
        Executor(p, 0, CPU, Broken())
    assert raised.value.in_collective


def test_factories_make_tensors_on_the_devices_own_device() -> None:
    p = program(1, [], [slot(0, f32(2))], op("aten.full.default", (2,), 1.0, outs=0, device=torch.device("meta")))
    assert Executor(p, 0, CPU, None).run([], [])[0].device == CPU


def test_gradients_are_not_recorded() -> None:
    p = program(1, [slot(0, f32(2))], [slot(1, f32(2))], op("aten.mul.Scalar", Ref(0), 2, outs=1))
    e = executor(p)
    for _ in range(2):
        assert not e.run([torch.ones(2, requires_grad=True)], [])[0].requires_grad


# Loops over micro-batches.


def sums(*values: int, owned: bool = False) -> Program:
    """The total over passes of the input times this pass's value."""
    return program(
        mesh(micro=len(values)),
        [slot(0, f32(2))],
        [slot(2, f32(2))],
        op("repeat"),
        op("aten.mul.Scalar", Ref(0), PerRank(("micro",), values), outs=1),
        op("accumulate", Ref(1), owned, outs=2, frees=(1,), shapes=((2,),)),
        op("end_repeat"),
    )


@pytest.mark.parametrize("owned", [False, True])
def test_a_loop_accumulates_over_its_passes(owned: bool) -> None:
    assert both_ways(sums(1, 20, 300, owned=owned), torch.ones(2))[0].tolist() == [321, 321]


def test_a_loop_of_one_pass_is_run_once() -> None:
    assert both_ways(sums(7), torch.ones(2))[0].tolist() == [7, 7]


def test_a_total_leaves_the_first_passes_tensor_alone_unless_it_owns_it() -> None:
    body = op("repeat"), op("accumulate", Ref(0), False, outs=1), op("end_repeat")
    p = program(mesh(micro=3), [slot(0, f32(2))], [slot(1, f32(2))], *body)
    x, e = torch.ones(2), executor(p)
    for _ in range(2):
        assert e.run([x], [])[0].tolist() == [3, 3] and x.tolist() == [1, 1]


def test_passes_may_be_of_different_lengths_on_every_device() -> None:
    start, end, n = (PerRank(("dp", "micro"), v) for v in ((0, 1, 0, 2), (1, 3, 2, 2), (1, 2, 2, 0)))
    p = program(
        mesh(dp=2, micro=2),
        [slot(0, f32(5, 2), split(0, (3, 2)))],
        [slot(3, f32(5, 2), split(0, (3, 2)))],
        op("repeat"),
        op("aten.slice.Tensor", Ref(0), 0, start, end, outs=1, shapes=((n, 2),)),
        op("collect", Ref(1), outs=2, frees=(1,)),
        op("end_repeat"),
        op("join", Ref(2), 0, outs=3, frees=(2,), shapes=((each(3, 2), 2),)),
    )
    for rank, length in ((0, 3), (1, 2)):
        x = torch.randn(length, 2)
        assert torch.equal(both_ways(p, x, rank=rank)[0], x)


def test_a_clock_tells_what_each_instruction_takes_in_all_passes() -> None:
    e = Executor(sums(1, 20, 300, owned=False), 0, CPU, None, clock=Clock(CPU))
    assert e.instruction_seconds() == ()
    e.run([torch.ones(2)], [])  # the first run is checked, and tells nothing
    assert e.instruction_seconds() == ()
    begin = time.perf_counter()
    e.run([torch.ones(2)], [])
    whole = time.perf_counter() - begin
    bound, multiplied, added, _ = e.instruction_seconds()
    assert bound == 0.0 < min(multiplied, added) and multiplied + added < whole


def test_a_later_loop_takes_what_an_earlier_one_collected_in_the_same_pass() -> None:
    p = program(
        mesh(micro=3),
        [slot(0, f32(1))],
        [slot(5, f32(3))],
        op("repeat"),
        op("aten.add.Scalar", Ref(0), PerRank(("micro",), (1, 2, 3)), outs=1),
        op("collect", Ref(1), outs=2, frees=(1,)),
        op("end_repeat"),
        op("repeat"),
        op("take", Ref(2), outs=3),
        op("aten.mul.Scalar", Ref(3), PerRank(("micro",), (1, 10, 100)), outs=4, frees=(3,)),
        op("collect", Ref(4), outs=6, frees=(4,)),
        op("end_repeat"),
        op("join", Ref(6), 0, outs=5),
    )
    assert both_ways(p, torch.zeros(1))[0].tolist() == [1, 20, 300]


def test_a_number_that_all_passes_agree_on_may_stand_outside_of_a_loop() -> None:
    full = op("aten.full.default", (PerRank(("dp", "micro"), (1, 1, 2, 2)),), 1.0, outs=0)
    p = program(mesh(dp=2, micro=2), [], [slot(0, f32(3), split(0, (1, 2)))], full)
    assert [len(both_ways(p, rank=rank)[0]) for rank in (0, 1)] == [1, 2]


def test_shapes_are_checked_in_every_pass() -> None:
    n = PerRank(("micro",), (1, 2))
    body = op("repeat"), op("aten.zeros.default", (n,), outs=0, shapes=((1,),), frees=(0,)), op("end_repeat")
    with pytest.raises(InstructionError, match=r"gave %0 the shape \[2\] where \[1\] was planned"):
        executor(program(mesh(micro=2), [], [], *body)).run([], [])


@pytest.mark.parametrize("runs_before", [0, 1])
def test_an_operator_that_fails_in_a_loop_is_named(runs_before: int) -> None:
    p = program(
        mesh(micro=3),
        [slot(0, f32(3))],
        [],
        op("repeat"),
        op("aten.select.int", Ref(0), 0, PerRank(("micro",), (0, 1, 2)), outs=1),
        op("aten.is_nonzero.default", Ref(1), outs=2, frees=(2,)),
        op("aten._assert_async.msg", Ref(1), "no more", where="train.py:33", frees=(1,)),
        op("end_repeat"),
    )
    e = executor(p)
    for _ in range(runs_before):
        e.run([torch.ones(3)], [])
    with pytest.raises(InstructionError, match=r"_assert_async.msg \(instruction 3 of .*, from train.py:33\) failed"):
        e.run([torch.tensor([1.0, 1.0, 0.0])], [])


def test_what_all_passes_use_is_freed_behind_the_last() -> None:
    died: list[bool] = []

    def look(x: torch.Tensor, kind: str) -> None:
        died.append(gone() is None)

    p = program(
        mesh(micro=2),
        [slot(0, f32(4), donated=True)],
        [slot(4, f32())],
        op("repeat"),
        op("aten.sum.default", Ref(0), outs=1),
        op("all_reduce", Ref(1), ("dp",), "sum", outs=2, frees=(1,)),
        op("accumulate", Ref(2), True, outs=3, frees=(2,)),
        op("end_repeat", frees=(0,)),
        op("all_reduce", Ref(3), ("dp",), "sum", outs=4, frees=(3,)),
    )
    e = Executor(p, 0, CPU, Lookout(look))
    for _ in range(2):
        inputs = [torch.ones(4)]
        gone = weakref.ref(inputs[0])
        assert e.run(inputs, [])[0].item() == 8
    assert died == [False, False, True] * 2


def test_what_a_pass_collects_and_another_takes_is_freed_at_once() -> None:
    alive: list[int] = []
    refs: list[weakref.ref] = []

    def look(x: torch.Tensor, kind: str) -> None:
        if kind == "sum":
            refs.append(weakref.ref(x))
        alive.append(sum(r() is not None for r in refs))

    p = program(
        mesh(micro=3),
        [],
        [],
        op("repeat"),
        op("aten.zeros.default", (1,), outs=0),
        op("all_reduce", Ref(0), ("dp",), "sum", outs=1, frees=(1,)),
        op("collect", Ref(0), outs=2, frees=(0,)),
        op("end_repeat"),
        op("repeat"),
        op("take", Ref(2), outs=3, frees=(3,)),
        op("aten.zeros.default", (1,), outs=4),
        op("all_reduce", Ref(4), ("dp",), "max", outs=5, frees=(4, 5)),
        op("end_repeat", frees=(2,)),
    )
    e = Executor(p, 0, CPU, Lookout(look))
    for _ in range(2):
        e.run([], [])
    assert alive == [1, 2, 3, 2, 1, 0] * 2
