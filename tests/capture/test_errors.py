"""Mistakes of a script are errors that say what, where, and what to do; afterwards the accelerator still works."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from tests.capture.compare import assert_same, randn
from tests.capture.conftest import Observed


def here(function: Callable[..., object], line: int = 1) -> str:
    """`file:line` of the `line`-th line of a function's body."""
    return f"{os.path.basename(__file__)}:{function.__code__.co_firstlineno + line}"


def still_works() -> bool:
    return torch.equal((randn(3).to("cuda") * 2).cpu(), randn(3) * 2)


def test_a_tensor_left_on_the_cpu_is_named_with_its_operator_and_line() -> None:
    def script() -> None:
        randn(3).to("cuda") * randn(3)

    with pytest.raises(RuntimeError) as raised:
        script()
    message = str(raised.value)
    assert "Expected all tensors to be on the same device" in message
    assert "aten.mul.Tensor" in message and "shape (3,)" in message
    assert here(script) in message
    assert ".to('cuda')" in message
    assert still_works()


def test_a_model_left_on_the_cpu_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.Linear(3, 3)(randn(2, 3).to("cuda"))
    assert still_works()


def test_tensors_of_several_devices_in_a_list_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([randn(3).to("cuda"), randn(3)])
    assert still_works()


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x @ x,
        lambda x: x + x[:, :2],
        lambda x: x.view(7),
        lambda x: torch.cat([x, x[:, :1]]),
        lambda x: x[5],
        lambda x: x.sum(3),
        lambda x: torch.nn.functional.linear(x, x.t()),
        lambda x: x.expand(2, 2),
        lambda x: x.add_(torch.ones(4, 2, 3).to(x.device)),
        lambda x: x.int().mean(),
    ],
)
def test_a_wrong_call_gets_the_message_of_torch(mistake: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(Exception) as expected:
        mistake(randn(2, 3))
    with pytest.raises(type(expected.value)) as raised:
        mistake(randn(2, 3).to("cuda"))
    assert str(raised.value).split("\n")[0] == str(expected.value).split("\n")[0]
    assert still_works()


def test_an_index_beyond_the_table_is_an_error_when_the_step_runs() -> None:
    table = randn(4, 2).to("cuda")
    found = torch.nn.functional.embedding(torch.tensor([7]).to("cuda"), table)
    with pytest.raises(Exception, match="index out of range"):
        found.cpu()
    assert still_works()


def test_what_a_failed_step_computed_stays_an_error_that_says_why(capture: Observed, monkeypatch) -> None:
    def fail(segment: object) -> list[object]:
        raise RuntimeError("a device is out of memory")

    working = capture.recorder.execute
    capture.recorder.execute = fail
    x = randn(3).to("cuda") * 2
    with pytest.raises(RuntimeError, match="out of memory"):
        x.cpu()
    capture.recorder.execute = working
    for use in (lambda: x.cpu(), lambda: (x + 1).cpu(), lambda: x.add_(1)):
        with pytest.raises(RuntimeError, match=r"The step that computed this value failed: a device is out of memory"):
            use()
    assert still_works()


def test_what_a_failed_step_only_read_keeps_its_value(capture: Observed) -> None:
    def fail(segment: object) -> list[object]:
        raise RuntimeError("a device is out of memory")

    weight = randn(3).to("cuda")
    working = capture.recorder.execute
    capture.recorder.execute = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        (weight * 2).cpu()
    capture.recorder.execute = working
    assert_same(weight, randn(3))
    assert_same(weight * 2, randn(3) * 2)


def test_a_lost_operand_spoils_nothing_of_the_segment_it_came_to(capture: Observed) -> None:
    """The replay path has taken in the first operand when it finds that the second has no value."""
    a, b = randn(3).to("cuda"), randn(3, seed=1).to("cuda")
    assert_same(torch.cat([a, b]) * 2, torch.cat([randn(3), randn(3, seed=1)]) * 2)
    capture.recorder.execute, working = (lambda segment: 1 / 0), capture.recorder.execute
    lost = a * 3
    with pytest.raises(ZeroDivisionError):
        lost.cpu()
    capture.recorder.execute = working
    with pytest.raises(RuntimeError, match="division by zero"):
        torch.cat([a, lost])
    assert_same(torch.cat([b, a]) * 2, torch.cat([randn(3, seed=1), randn(3)]) * 2)


def test_memory_that_was_never_written_reads_as_zeros() -> None:
    x = torch.empty(3, device="cuda")
    assert_same(x + 1, torch.ones(3))
    assert_same(x, torch.zeros(3))


def test_an_unsupported_dtype_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"no tensors of dtype torch\.float8_e4m3fn; it has"):
        torch.empty(3, dtype=torch.float8_e4m3fn, device="cuda")
    assert still_works()


def test_an_operator_that_no_device_has_is_named_with_the_line_and_a_way_out() -> None:
    library = torch.library.Library("moai_tests", "DEF")
    library.define("only_on_the_cpu(Tensor x) -> Tensor")
    library.impl("only_on_the_cpu", lambda x: x + 1, "CPU")
    with pytest.raises(NotImplementedError) as raised:
        torch.ops.moai_tests.only_on_the_cpu(torch.ones(2, device="cuda"))
    message = str(raised.value)
    assert "no kernel for moai_tests.only_on_the_cpu.default at test_errors.py:" in message
    assert ".cpu()" in message
    assert still_works()


def test_a_histogram_of_integers_without_a_range_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"min < max here \(got 0 and 0\) at test_errors.py:"):
        torch.histc(torch.arange(4, device="cuda"), 2)
    assert still_works()
