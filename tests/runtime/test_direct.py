"""What generated code calls for an operator does what the operator does."""

from typing import Any

import pytest
import torch

from moai.runtime import direct

aten = torch.ops.aten


def x() -> torch.Tensor:
    return torch.arange(6.0).view(2, 3) + 1


def bias() -> torch.Tensor:
    return torch.ones(3)


CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.add.Tensor, (x(), bias()), {"alpha": 2}),
    (aten.add.Tensor, (x(), 2), {}),  # a number for a tensor
    (aten.add_.Tensor, (x(), bias()), {"alpha": 2}),
    (aten.addmm.default, (bias(), x(), x().T @ x()), {"beta": 2, "alpha": 3}),
    (aten.copy_.default, (x(), bias()), {}),
    (aten.mm.default, (x(), x().T), {}),
    (aten.mm.out, (x(), x().T), {"out": torch.empty(2, 2)}),
    (aten.mul.Tensor, (x(), bias().int()), {}),
    (aten.mul_.Tensor, (x(), bias()), {}),
    (aten.neg.default, (x(),), {}),
    (aten.permute.default, (x(), [1, 0]), {}),
    (aten.pow.Tensor_Scalar, (x(), 1.5), {}),
    (aten.reshape.default, (x(), [3, -1]), {}),
]


def test_every_operator_of_the_table_is_tried_here() -> None:
    assert set(direct._FUNCTIONS) == {operator for operator, _, _ in CALLS}


@pytest.mark.parametrize(("operator", "args", "kwargs"), CALLS, ids=[str(operator) for operator, _, _ in CALLS])
def test_the_function_does_what_the_operator_does(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def called(function: Any) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """The result, what was its first argument, and whether they share memory."""
        first, *others = (a.clone() if isinstance(a, torch.Tensor) else a for a in args)
        found: torch.Tensor = function(first, *others, **kwargs)
        return found.clone(), first, found.data_ptr() == first.data_ptr()

    assert direct.direct(operator) is not operator
    torch.testing.assert_close(called(direct.direct(operator)), called(operator), rtol=0, atol=0)


def test_another_operator_is_called_as_it_is() -> None:
    assert direct.direct(aten.cos.default) is aten.cos.default
