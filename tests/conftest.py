import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory):
    """Tests neither see nor wait for the accelerators of who runs them."""
    folder = tmp_path_factory.mktemp("state")
    before = {name: os.environ.get(name) for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME")}
    os.environ.update(XDG_STATE_HOME=str(folder / "state"), XDG_CONFIG_HOME=str(folder / "config"))
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
