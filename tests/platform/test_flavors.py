"""Which accelerator a program gets."""

import pytest

from moai.platform import flavors
from moai.platform.pool import GB, MB, Machine

LAPTOP = Machine(cores=2, memory_bytes=23 * GB)
SINGLE_CORE = Machine(cores=1, memory_bytes=23 * GB)
THREE_GPUS = Machine(cores=32, memory_bytes=256 * GB, cuda_memory_bytes=(80 * GB,) * 3)
EIGHT_GPUS = Machine(cores=64, memory_bytes=512 * GB, cuda_memory_bytes=(80 * GB,) * 8)


@pytest.fixture
def environ(tmp_path):
    return {"XDG_STATE_HOME": str(tmp_path)}


def names(machine):
    return [f.name for f in flavors.available(machine)]


def test_a_name_is_a_size_and_the_memory_of_all_devices():
    assert names(LAPTOP) == ["Small.4GB", "Medium.8GB", "Large.16GB"]
    assert names(EIGHT_GPUS) == ["Small.80GB", "Medium.160GB", "Large.320GB", "xLarge.640GB"]


def test_memory_below_a_gigabyte_is_named_in_megabytes():
    assert names(Machine(cores=2, memory_bytes=2 * GB))[0] == f"Small.{256}MB"
    assert flavors.available(Machine(cores=2, memory_bytes=2 * GB))[0].memory_bytes == 256 * MB


def test_a_number_of_devices_without_a_size_is_still_offered_whole():
    assert names(THREE_GPUS) == ["Small.80GB", "Medium.160GB", "Custom.240GB"]


def test_default_is_two_cpu_workers(environ):
    assert flavors.choose(environ, LAPTOP).name == "Medium.8GB"


def test_default_on_a_single_core_is_one_cpu_worker(environ):
    assert flavors.choose(environ, SINGLE_CORE).n_devices == 1


def test_default_is_all_gpus(environ):
    assert flavors.choose(environ, EIGHT_GPUS).name == "xLarge.640GB"
    assert flavors.choose(environ, THREE_GPUS).n_devices == 3


@pytest.mark.parametrize("name", ["Large.16GB", "Large", "large", "LARGE.16gb"])
def test_moai_flavor_chooses_by_name(environ, name):
    assert flavors.choose({**environ, "MOAI_FLAVOR": name}, LAPTOP).n_devices == 4


@pytest.mark.parametrize("name", ["Huge", "Large.64GB", "xLarge"])
def test_an_unknown_flavor_is_refused_with_the_list(environ, name):
    with pytest.raises(ValueError, match=rf"MOAI_FLAVOR={name}.*Small\.4GB, Medium\.8GB, Large\.16GB"):
        flavors.choose({**environ, "MOAI_FLAVOR": name}, LAPTOP)


def test_moai_devices_takes_exactly_that_many(environ):
    flavor = flavors.choose({**environ, "MOAI_DEVICES": "3"}, LAPTOP)
    assert (flavor.name, flavor.n_devices) == ("Custom.12GB", 3)
    assert flavors.choose({**environ, "MOAI_DEVICES": "4"}, LAPTOP).name == "Large.16GB"


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5", "²"])
def test_moai_devices_must_be_a_positive_number(environ, count):
    with pytest.raises(ValueError, match="a number of devices is expected"):
        flavors.choose({**environ, "MOAI_DEVICES": count}, LAPTOP)


def test_more_devices_than_there_are_are_refused(environ):
    with pytest.raises(RuntimeError, match="no free device"):
        flavors.choose({**environ, "MOAI_DEVICES": "9"}, EIGHT_GPUS)


def test_flavor_and_devices_together_are_refused(environ):
    with pytest.raises(ValueError, match="both set"):
        flavors.choose({**environ, "MOAI_FLAVOR": "Small", "MOAI_DEVICES": "2"}, LAPTOP)


def test_the_saved_choice_holds_for_later_programs(environ):
    flavors.save_choice(flavors.find("Small", LAPTOP), environ)
    assert flavors.choose(environ, LAPTOP).name == "Small.4GB"


def test_the_environment_goes_before_the_saved_choice(environ):
    flavors.save_choice(flavors.find("Small", LAPTOP), environ)
    assert flavors.choose({**environ, "MOAI_FLAVOR": "Large"}, LAPTOP).name == "Large.16GB"


def test_a_saved_choice_that_is_gone_is_said(environ):
    flavors.save_choice(flavors.find("xLarge", EIGHT_GPUS), environ)
    with pytest.raises(ValueError, match="The saved flavor, xLarge"):
        flavors.choose(environ, LAPTOP)


def test_an_accelerator_is_configured_once_the_user_has_chosen(environ):
    assert not flavors.configured(environ)
    assert flavors.configured({**environ, "MOAI_FLAVOR": "Small"})
    assert flavors.configured({**environ, "MOAI_DEVICES": "2"})
    flavors.save_choice(flavors.find("Small", LAPTOP), environ)
    assert flavors.configured(environ)


def test_asking_for_the_choice_leaves_no_files(environ, tmp_path):
    flavors.choose(environ, LAPTOP)
    flavors.configured(environ)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_state_file_is_no_choice(environ, tmp_path):
    (tmp_path / "moai").mkdir()
    (tmp_path / "moai" / "state.sqlite3").write_text("not a database, but long enough to be taken for one" * 10)
    assert not flavors.configured(environ)
    assert flavors.choose(environ, LAPTOP).name == "Medium.8GB"
