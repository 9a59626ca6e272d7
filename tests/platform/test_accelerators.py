"""Accelerators: a token's own, added, removed, switched, and what runs on them."""

import subprocess
import sys

import pytest

from moai.platform import accelerators, flavors, jobs, pool, state, telemetry, tokens
from moai.platform.accelerators import AcceleratorError
from moai.platform.device import Device
from moai.platform.pool import GB, Machine
from tests.platform.programs import HOLD

LAPTOP = Machine(cores=2, memory_bytes=23 * GB)
SMALL, MEDIUM, LARGE = flavors.available(LAPTOP)


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
    monkeypatch.setattr(pool, "probe", lambda environ=None: LAPTOP)


def listed(environ):
    """As moreh-smi shows them: "* 0 Medium.8GB"."""
    return [f"{'*' if a.is_default else ' '} {a.id} {a.flavor}" for a in accelerators.accelerators(environ)]


def test_a_fresh_user_has_one_accelerator(environ):
    assert listed(environ) == ["* 0 Medium.8GB"]


def test_an_added_accelerator_gets_the_next_id_and_the_default_stays(environ):
    assert accelerators.add(LARGE, environ).id == 1
    assert accelerators.add(SMALL, environ).id == 2
    assert listed(environ) == ["* 0 Medium.8GB", "  1 Large.16GB", "  2 Small.4GB"]


def test_five_accelerators_are_the_most(environ):
    for _ in range(4):
        accelerators.add(SMALL, environ)
    with pytest.raises(AcceleratorError, match="No more than 5 accelerators"):
        accelerators.add(SMALL, environ)
    accelerators.remove(2, environ)
    accelerators.add(SMALL, environ)


def test_ids_are_neither_renumbered_nor_given_twice(environ):
    for _ in range(2):
        accelerators.add(SMALL, environ)
    accelerators.remove(2, environ)
    accelerators.remove(0, environ)
    assert accelerators.add(SMALL, environ).id == 3
    assert [a.id for a in accelerators.accelerators(environ)] == [1, 3]


def test_removing_the_default_makes_the_lowest_id_the_default(environ):
    for _ in range(2):
        accelerators.add(SMALL, environ)
    accelerators.remove(0, environ)
    assert listed(environ) == ["* 1 Small.4GB", "  2 Small.4GB"]


def test_the_only_accelerator_cannot_be_removed(environ):
    with pytest.raises(AcceleratorError, match="is the only one"):
        accelerators.remove(0, environ)


def test_switching_moves_the_default(environ):
    accelerators.add(SMALL, environ)
    accelerators.switch(1, environ)
    assert listed(environ) == ["  0 Medium.8GB", "* 1 Small.4GB"]
    assert accelerators.selected(environ).id == 1


@pytest.mark.parametrize("act", [accelerators.remove, accelerators.switch])
def test_an_unknown_id_is_refused_with_those_there_are(environ, act):
    accelerators.add(SMALL, environ)
    with pytest.raises(AcceleratorError, match=r"There is no accelerator 7\. There are: 0, 1\."):
        act(7, environ)


def test_the_flavor_of_the_default_accelerator_is_set(environ):
    accelerators.set_flavor(LARGE, environ)
    assert listed(environ) == ["* 0 Large.16GB"]


@pytest.mark.parametrize("name", ["MOREH_VISIBLE_DEVICE", "MOREH_VISIBLE_DEVICES"])
def test_the_environment_selects_the_accelerator(environ, name):
    accelerators.add(SMALL, environ)
    mine = {**environ, name: "1"}
    assert accelerators.selected(mine).id == 1
    assert accelerators.choose(mine, LAPTOP) == accelerators.Choice(1, SMALL)
    accelerators.set_flavor(LARGE, mine)
    assert listed(environ) == ["* 0 Medium.8GB", "  1 Large.16GB"]


def test_a_selected_accelerator_that_does_not_exist_is_refused(environ):
    mine = {**environ, "MOREH_VISIBLE_DEVICE": "3"}
    for act in (accelerators.selected, accelerators.choose):
        with pytest.raises(AcceleratorError, match=r"There is no accelerator 3\. There are: 0\."):
            act(mine)


def test_an_id_is_a_number(environ):
    with pytest.raises(AcceleratorError, match="MOREH_VISIBLE_DEVICES=0,1: the id of one accelerator"):
        accelerators.selected({**environ, "MOREH_VISIBLE_DEVICES": "0,1"})


def test_a_flavor_that_is_no_longer_offered_is_still_listed(environ):
    accelerators.set_flavor(flavors.Flavor("Vast", (), "Vast.9GB"), environ)
    assert listed(environ) == ["* 0 Vast.9GB"]


# Tokens


def test_the_local_users_token_is_made_once(environ):
    token = accelerators.token(environ)
    assert len(token) == 24
    assert accelerators.token(environ) == token


def test_a_token_has_its_own_accelerators(environ):
    other = {**environ, "MOREH_SDA_TOKEN": tokens.create("a colleague", environ)}
    accelerators.add(LARGE, other)
    accelerators.switch(1, other)
    assert listed(other) == ["  0 Medium.8GB", "* 1 Large.16GB"]
    assert listed(environ) == ["* 0 Medium.8GB"]
    assert accelerators.choose(other, LAPTOP).accelerator == 1


def test_an_unknown_token_is_refused(environ):
    accelerators.token(environ)
    wrong = {**environ, "MOREH_SDA_TOKEN": "no-such-token"}
    for act in (accelerators.token, accelerators.accelerators, accelerators.choose):
        with pytest.raises(AcceleratorError, match="There is no token no-such-token"):
            act(wrong)


# What runs on them


def test_a_busy_accelerator_shows_its_job(environ, start):
    accelerators.add(SMALL, environ)
    program = start(MOREH_VISIBLE_DEVICE="1")
    job_id, _ = program.lease()
    idle, busy = accelerators.accelerators(environ)
    assert idle.job is None
    assert (busy.job.id, busy.job.pid, busy.job.plan) == (job_id, program.pid, "one plan")
    assert busy.job.usage == telemetry.NOTHING


def test_a_busy_accelerator_is_neither_removed_nor_changed(environ, start):
    accelerators.add(SMALL, environ)
    program = start()
    program.lease()
    busy = f"Accelerator 0 is in use by process {program.pid}"
    for act in (
        lambda: accelerators.remove(0, environ),
        lambda: accelerators.switch(0, environ),
        lambda: accelerators.set_flavor(LARGE, environ),
    ):
        with pytest.raises(AcceleratorError, match=busy):
            act()
    program.end()
    accelerators.set_flavor(LARGE, environ)


def test_another_accelerator_becomes_the_default_while_the_old_one_works(environ, start):
    accelerators.add(SMALL, environ)
    start().lease()
    accelerators.switch(1, environ)
    assert listed(environ) == ["  0 Medium.8GB", "* 1 Small.4GB"]


def test_an_accelerator_of_a_programs_own_is_listed_while_it_runs(environ, start):
    program = start(MOAI_DEVICES="3")
    job_id, _ = program.lease()
    _, own = accelerators.accelerators(environ)
    assert (own.id, own.flavor.name, own.is_default, own.job.pid) == (
        accelerators.OWN_IDS + job_id,
        "Custom.12GB",
        False,
        program.pid,
    )
    assert own.flavor.memory_bytes == 12 * GB
    with pytest.raises(AcceleratorError, match=f"belongs to process {program.pid}"):
        accelerators.remove(own.id, environ)
    program.end()
    assert listed(environ) == ["* 0 Medium.8GB"]


def test_reset_ends_the_program_on_the_default_accelerator(environ, start):
    program = start()
    program.lease()
    assert accelerators.reset(environ)
    assert accelerators.accelerators(environ)[0].job is None
    assert program.end() == -15
    assert jobs.history(environ)[0].exit == "reset"


def test_reset_ends_a_program_that_does_not_want_to(environ, start, monkeypatch):
    monkeypatch.setattr(accelerators, "TERM_SECONDS", 0.3)
    program = start(
        f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', file=sys.stderr)\n{HOLD}"
    )
    program.said("deaf")
    assert accelerators.reset(environ)
    assert program.end() == -9


def test_reset_of_an_idle_accelerator_says_so(environ, start):
    accelerators.add(SMALL, environ)
    start(MOREH_VISIBLE_DEVICE="1").lease()
    assert not accelerators.reset(environ)
    assert accelerators.reset({**environ, "MOREH_VISIBLE_DEVICE": "1"})


def test_nothing_here_imports_torch():
    code = "from moai.platform import admission, accelerators; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_usage_is_that_of_the_jobs_devices(environ, start):
    job_id, _ = start().lease()
    reports = [Report(memory=3 * GB, busy=1.0), Report(memory=GB, busy=0.5)]
    devices = [Device("cpu", i, 4 * GB, 1) for i in range(2)]
    telemetry.Publisher(job_id, devices, lambda: reports, environ).stop()
    usage = accelerators.accelerators(environ)[0].job.usage
    assert (usage.memory_bytes, usage.utilization) == (4 * GB, 0.75)
    assert [(d.index, d.memory_bytes, d.total_bytes, d.utilization) for d in usage.devices] == [
        (0, 3 * GB, 4 * GB, 1.0),
        (1, GB, 4 * GB, 0.5),
    ]


class Report:
    def __init__(self, memory, busy):
        self.memory = self.peak = memory
        self.busy = busy


# A state that cannot be used


@pytest.mark.parametrize(
    "act", [accelerators.accelerators, accelerators.token, lambda environ: accelerators.add(SMALL, environ)]
)
def test_a_damaged_database_is_left_as_it_is_and_said_in_one_line(environ, act):
    file = state.database(environ)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a database" * 100)
    with pytest.raises(AcceleratorError, match=r"is damaged .* Nothing was changed; `mv ") as error:
        act(environ)
    assert "\n" not in str(error.value)
    assert file.read_bytes() == b"not a database" * 100
