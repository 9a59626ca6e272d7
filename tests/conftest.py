import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory):
    """Tests neither see nor wait for the accelerators of who runs them, and lower their graphs themselves."""
    folder = tmp_path_factory.mktemp("state")
    before = {name: os.environ.get(name) for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "MOAI_PROGRAM_CACHE")}
    os.environ.update(
        XDG_STATE_HOME=str(folder / "state"), XDG_CONFIG_HOME=str(folder / "config"), MOAI_PROGRAM_CACHE="0"
    )
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture
def double_precision():
    """Tensors are made in fp64, and the same in every run: what is compared shows mistakes, not rounding."""
    import torch  # not every test is to wait for it

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
