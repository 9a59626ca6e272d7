"""The same script on the CPU and on the accelerator must give the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

RUNS = 3  # the first run describes every call, the second and third replay them


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers on the CPU, the same ones for a seed."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def assert_same(got: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Nested results agree in structure, shapes, dtypes and values."""
    a, b = list(_leaves(got)), list(_leaves(expected))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)


def assert_same_on_accelerator(script: Callable[[str], Any], runs: int = RUNS) -> None:
    """`script(device)` gives on "cuda" what it gives on "cpu", however often it runs."""
    torch.manual_seed(0)
    expected = list(_leaves(script("cpu")))
    for _ in range(runs):
        torch.manual_seed(0)
        assert_same(script("cuda"), expected)


def same_as_cpu(script: Callable[[str], Any]) -> Callable[[], None]:
    """A test out of a script: a function of the device that returns what is to be compared."""

    def test() -> None:
        assert_same_on_accelerator(script)

    test.__name__, test.__doc__, test.__module__ = script.__name__, script.__doc__, script.__module__
    return test


def _leaves(result: Any) -> Iterator[torch.Tensor]:
    """The tensors of a nested result on the CPU; numbers become tensors."""
    if isinstance(result, torch.Tensor):
        yield result.detach().cpu().clone()
    elif isinstance(result, (list, tuple)):
        for r in result:
            yield from _leaves(r)
    elif result is not None:
        yield torch.tensor(result)
