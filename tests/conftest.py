"""What every test finds: a user without accelerators, settings or programs lowered before, who sits at a terminal."""

import gc
import os
import signal
import tempfile

import pytest


def pytest_configure(config):
    """Before tests are imported: some look at their environment then."""
    folder = tempfile.TemporaryDirectory(prefix="moai-tests-")
    config.add_cleanup(folder.cleanup)
    for name in [n for n in os.environ if n.startswith(("MOAI_", "MOREH_", "TORCH_DEVICE_BACKEND_"))]:
        if not name.startswith("MOAI_TEST_"):  # these are for the tests
            del os.environ[name]
    os.environ.update(
        XDG_STATE_HOME=f"{folder.name}/state",
        XDG_CONFIG_HOME=f"{folder.name}/config",
        MOAI_PROGRAM_CACHE="0",
        MOAI_VALIDATE="1",  # every program that is lowered, here and in scripts
    )
    # A shell starts what runs in the background deaf to Ctrl-C, and so would be the programs that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """What is imported by now stays: two million objects that no collection of garbage need look at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def double_precision():
    """Tensors are made in fp64, and the same in every run: what is compared shows mistakes, not rounding."""
    import torch  # not every test is to wait for it

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
