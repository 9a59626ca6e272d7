from collections.abc import Callable, Iterator

import pytest

from moai.runtime.accelerator import Accelerator
from tests.runtime.programs import cpus


@pytest.fixture(scope="session")
def accelerator() -> Iterator[Callable[[int], Accelerator]]:
    """Accelerators by number of devices, shared by the tests that leave them healthy."""
    started: dict[int, Accelerator] = {}

    def of_size(n: int) -> Accelerator:
        if n not in started:
            started[n] = Accelerator(cpus(n))
        return started[n]

    yield of_size
    for each in started.values():
        each.close()


@pytest.fixture
def doomed() -> Iterator[Accelerator]:
    """An accelerator of two devices that the test may break."""
    it = Accelerator(cpus(2))
    yield it
    it.close()
