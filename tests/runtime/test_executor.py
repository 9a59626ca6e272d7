"""An executor runs one device's part of a program."""

import gc
import weakref

import pytest
import torch

from moai.graph.placement import Shard
from moai.graph.step_graph import Ref, Scalar, TensorType
from moai.lower.program import PerRank, Program
from moai.runtime.collectives import Alone
from moai.runtime.executor import Executor, InstructionError
from tests.runtime.programs import f32, op, program, slot

CPU = torch.device("cpu")


def executor(p: Program, rank: int = 0) -> Executor:
    return Executor(p, rank, CPU, Alone())


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
    p = program(2, [], [slot(0, f32(5), Shard(0, (3, 2)))], op("aten.full.default", (PerRank((3, 2)),), 1.0, outs=0))
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
        size = (PerRank(sizes), 2)
        rows = op("moai.random.default", size, "normal", 0.0, 1.0, 7, PerRank(starts), torch.float32, outs=0)
        return both_ways(program(len(sizes), [], [slot(0, f32(4, 2), Shard(0, sizes))], rows), rank=rank)[0]

    assert torch.equal(draw((4,), 0), torch.cat([draw((1, 3), 0), draw((1, 3), 1)]))


def test_inputs_are_freed_at_their_last_use() -> None:
    died: list[bool] = []

    class Peers(Alone):
        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            gc.collect()
            died.append(gone() is None)
            return x

    p = program(
        1,
        [slot(0, f32(4), donated=True)],
        [slot(2, f32(4))],
        op("aten.neg.default", Ref(0), outs=1, frees=(0,)),
        op("all_reduce", Ref(1), outs=2, frees=(1,)),
    )
    e = Executor(p, 0, CPU, Peers())
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
    wrong = op("aten.neg.default", Ref(0), outs=1, shapes=((PerRank((3, 4)),),), where="train.py:12")
    p = program(2, [slot(0, f32(6), Shard(0, (3, 3)))], [slot(1, f32(7), Shard(0, (3, 4)))], wrong)
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


def test_factories_make_tensors_on_the_devices_own_device() -> None:
    p = program(1, [], [slot(0, f32(2))], op("aten.full.default", (2,), 1.0, outs=0, device=torch.device("meta")))
    assert Executor(p, 0, CPU, Alone()).run([], [])[0].device == CPU


def test_gradients_are_not_recorded() -> None:
    p = program(1, [slot(0, f32(2))], [slot(1, f32(2))], op("aten.mul.Scalar", Ref(0), 2, outs=1))
    e = executor(p)
    for _ in range(2):
        assert not e.run([torch.ones(2, requires_grad=True)], [])[0].requires_grad
