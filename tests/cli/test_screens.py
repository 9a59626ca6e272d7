"""The screens of `moreh-smi`, character for character as the original draws them."""

import time

import pytest

from moai.cli import screens
from moai.cli.snapshot import Snapshot
from moai.platform.accelerators import Accelerator, AcceleratorError, DeviceUsage, RunningJob, Usage
from moai.platform.pool import MB
from tests.cli.conftest import flavor


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def accelerator(id=0, model="2xLarge.1024GB", is_default=True, job=None):
    return Accelerator(id=id, flavor=flavor(model), is_default=is_default, job=job)


def running(command="python tutorial/train_demo.py", memory=4096 * MB, utilization=0.62, plan="", **other):
    usage = Usage(memory, utilization, tuple(other.get("devices", ())))
    return RunningJob(other.get("id", 1001), other.get("pid", 424242), command, plan, 0.0, usage)


def snapshot(*accelerators, name="MoAI Accelerator", version="1.0.0"):
    return Snapshot(
        now=1714566896.0,
        name=name,
        version=version,
        latest_version="1.0.0",
        token="bW9haS1leGFtcGxlLXRva2Vu",
        accelerators=accelerators,
    )


BUSY = """\
12:34:56 May 01, 2024
+-----------------------------------------------------------------------------------------------------+
|                                                      Current Version: 1.0.0  Latest Version: 1.0.0  |
+-----------------------------------------------------------------------------------------------------+
|  Device  |        Name         |       Model      |  Memory Usage  |  Total Memory  |  Utilization  |
+=====================================================================================================+
|  * 0     |   MoAI Accelerator  |  2xLarge.1024GB  |  4096 MiB      |  1048320 MiB   |   62 %        |
+-----------------------------------------------------------------------------------------------------+

Processes:
+-----------------------------------------------------------------------------------+
|  Device  |  Job ID  |    PID   |             Process             |  Memory Usage  |
+===================================================================================+
|       0  |    1001  |  424242  |  python tutorial/train_demo.py  |  4096 MiB      |
+-----------------------------------------------------------------------------------+"""

IDLE = """\
12:34:56 May 01, 2024
+--------------------------------------------------------------------------------------------------+
|                                                   Current Version: 1.0.0  Latest Version: 1.0.0  |
+--------------------------------------------------------------------------------------------------+
|  Device  |        Name         |     Model     |  Memory Usage  |  Total Memory  |  Utilization  |
+==================================================================================================+
|  * 0     |   MoAI Accelerator  |  Large.256GB  |  -             |  -             |  -            |
|    1     |   MoAI Accelerator  |  Small.64GB   |  -             |  -             |  -            |
+--------------------------------------------------------------------------------------------------+"""

MODELS = """\
+---------------------------------------------------+
|  Device  |        Name         |       Model      |
+===================================================+
|  * 0     |   MoAI Accelerator  |  2xLarge.1024GB  |
|    1     |   MoAI Accelerator  |  Small.64GB      |
+---------------------------------------------------+"""

TOKENS = """\
12:34:56 May 01, 2024
+----------------------------------------------------------------------------------+
|  Device  |        Name         |            Token           |        Model       |
+==================================================================================+
|  * 0     |   MoAI Accelerator  |  bW9haS1leGFtcGxlLXRva2Vu  |  24xLarge.12288GB  |
|    1     |   MoAI Accelerator  |  bW9haS1leGFtcGxlLXRva2Vu  |  Small.64GB        |
+----------------------------------------------------------------------------------+"""

HARDWARE = """\
12:34:56 May 01, 2024
+--------------------------------------------------------------------------------------+
|  Dev  |  Location  |  Dev Temp  |  Mem Temp  |  Dev Util  |  Mem Util  |  Mem Usage  |
+======================================================================================+
|  0    |  back01:0  |  36 C      |  -         |  35 %      |  -         |  1 %        |
|  1    |  back01:1  |  -         |  -         |  0 %       |  -         |  50 %       |
+--------------------------------------------------------------------------------------+"""


def test_a_busy_accelerator_and_its_process():
    assert screens.status(snapshot(accelerator(job=running()))) == BUSY


def test_idle_accelerators_show_dashes_and_no_processes():
    idle = snapshot(accelerator(model="Large.256GB"), accelerator(1, "Small.64GB", is_default=False))
    assert screens.status(idle) == IDLE


def test_the_accelerators_and_their_models():
    both = [accelerator(), accelerator(1, "Small.64GB", is_default=False)]
    assert screens.models(both, "MoAI Accelerator") == MODELS


def test_the_token_screen():
    both = snapshot(accelerator(model="24xLarge.12288GB"), accelerator(1, "Small.64GB", is_default=False))
    assert screens.tokens(both) == TOKENS


def test_the_hardware_screen():
    devices = [
        DeviceUsage("back01", 0, 655 * MB, 65_520 * MB, 0.35, 36.2),
        DeviceUsage("back01", 1, 32_760 * MB, 65_520 * MB, 0.0, None),
    ]
    busy = accelerator(job=running(devices=devices))
    assert screens.hardware(1714566896.0, busy, "unused") == HARDWARE


def test_the_hardware_screen_of_an_idle_accelerator_shows_where_its_devices_are():
    lines = screens.hardware(0.0, accelerator(model="Large.256GB"), "back07").splitlines()
    assert [line.split("|")[2].strip() for line in lines[4:-1]] == [f"back07:{i}" for i in range(4)]
    assert set(lines[4].split("|")[3:-1]) == {"  -         ", "  -          "}


@pytest.mark.parametrize(
    ("utilization", "cell"), [(1.0, "|  100 %        |"), (0.62, "|   62 %        |"), (0.0, "|    0 %        |")]
)
def test_utilization_takes_three_places(utilization, cell):
    assert cell in screens.status(snapshot(accelerator(job=running(utilization=utilization))))


def test_widths_of_the_published_tables():
    """101 dashes for 4xLarge.2048GB, 99 and 97 for the shorter names; 84 and 87 for processes of 29 and 32
    characters."""

    def dashes(text):
        return [len(line) - 2 for line in text.splitlines() if line.startswith("+-")]

    for model, width in (("4xLarge.2048GB", 101), ("xLarge.512GB", 99), ("Small.64GB", 97)):
        assert dashes(screens.status(snapshot(accelerator(model=model))))[0] == width
    for length, width in ((29, 84), (32, 87)):
        job = running(command="x" * length, id=975583, pid=4090049)
        assert dashes(screens.status(snapshot(accelerator(job=job))))[-1] == width


def test_the_plan_of_a_running_job_is_one_line_below_the_processes():
    planned = running(plan="No PP, No TP, dp : 16")
    lines = screens.status(snapshot(accelerator(job=planned))).splitlines()
    assert lines[-2:] == ["", "Plan of job 1001: No PP, No TP, dp : 16"]


def test_the_version_is_empty_without_torch():
    assert "Current Version:   Latest Version: 1.0.0  |" in screens.status(snapshot(accelerator(), version=""))


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("KT AI Accelerator", "|  KT AI Accelerator  |"),
        ("Moreh SDA", "|          Moreh SDA  |"),
        ("Ambre AI Accelerator", "|  Ambre AI Accelerator  |"),
    ],
)
def test_the_name_of_the_accelerator_is_the_operators(name, cell):
    assert cell in screens.models([accelerator()], name)


def test_a_snapshot_can_be_narrowed_to_one_accelerator():
    both = snapshot(accelerator(), accelerator(1, "Small.64GB", is_default=False))
    assert [a.id for a in both.only(1).accelerators] == [1]
    with pytest.raises(AcceleratorError, match=r"no accelerator 7.*0, 1"):
        both.only(7)
