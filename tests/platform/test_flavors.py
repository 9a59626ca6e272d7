"""Which accelerator a program gets."""

import pytest

from moai.platform import accelerators, flavors, state
from moai.platform.errors import StateError
from moai.platform.pool import GB, MB, Machine

LAPTOP = Machine(cores=2, memory_bytes=23 * GB)
SINGLE_CORE = Machine(cores=1, memory_bytes=23 * GB)
THREE_GPUS = Machine(cores=32, memory_bytes=256 * GB, cuda_memory_bytes=(80 * GB,) * 3)
EIGHT_GPUS = Machine(cores=64, memory_bytes=512 * GB, cuda_memory_bytes=(80 * GB,) * 8)


SMALL = flavors.available(LAPTOP)[0]


def damage(environ):
    file = state.database(environ)
    file.parent.mkdir()
    file.write_text("not a database, but long enough to be taken for one" * 10)


def names(machine):
    return [f.name for f in flavors.available(machine)]


def choose(environ, machine):
    return accelerators.choose(environ, machine).flavor


def test_a_name_is_a_size_and_the_memory_of_all_devices():
    assert names(LAPTOP) == ["Small.4GB", "Medium.8GB", "Large.16GB"]
    assert names(EIGHT_GPUS) == ["Small.80GB", "Medium.160GB", "Large.320GB", "xLarge.640GB"]


def test_memory_below_a_gigabyte_is_named_in_megabytes():
    assert names(Machine(cores=2, memory_bytes=2 * GB))[0] == f"Small.{256}MB"
    assert flavors.available(Machine(cores=2, memory_bytes=2 * GB))[0].memory_bytes == 256 * MB


def test_a_number_of_devices_without_a_size_is_still_offered_whole():
    assert names(THREE_GPUS) == ["Small.80GB", "Medium.160GB", "Custom.240GB"]


def test_default_is_two_cpu_workers(environ):
    assert choose(environ, LAPTOP).name == "Medium.8GB"


def test_default_on_a_single_core_is_one_cpu_worker(environ):
    assert choose(environ, SINGLE_CORE).n_devices == 1


def test_default_is_all_gpus(environ):
    assert choose(environ, EIGHT_GPUS).name == "xLarge.640GB"
    assert choose(environ, THREE_GPUS).n_devices == 3


@pytest.mark.parametrize("name", ["Large.16GB", "Large", "large", "LARGE.16gb"])
def test_moai_flavor_chooses_by_name(environ, name):
    assert choose({**environ, "MOAI_FLAVOR": name}, LAPTOP).n_devices == 4


@pytest.mark.parametrize("name", ["Huge", "Large.64GB", "xLarge"])
def test_an_unknown_flavor_is_refused_with_the_list(environ, name):
    with pytest.raises(ValueError, match=rf"MOAI_FLAVOR={name}.*Small\.4GB, Medium\.8GB, Large\.16GB"):
        choose({**environ, "MOAI_FLAVOR": name}, LAPTOP)


def test_moai_devices_takes_exactly_that_many(environ):
    flavor = choose({**environ, "MOAI_DEVICES": "3"}, LAPTOP)
    assert (flavor.name, flavor.n_devices) == ("Custom.12GB", 3)
    assert choose({**environ, "MOAI_DEVICES": "4"}, LAPTOP).name == "Large.16GB"


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5", "²"])
def test_moai_devices_must_be_a_positive_number(environ, count):
    with pytest.raises(ValueError, match="a number of devices is expected"):
        choose({**environ, "MOAI_DEVICES": count}, LAPTOP)


def test_more_devices_than_there_are_are_refused(environ):
    with pytest.raises(RuntimeError, match="no free device"):
        choose({**environ, "MOAI_DEVICES": "9"}, EIGHT_GPUS)


def test_flavor_and_devices_together_are_refused(environ):
    with pytest.raises(ValueError, match="both set"):
        choose({**environ, "MOAI_FLAVOR": "Small", "MOAI_DEVICES": "2"}, LAPTOP)


def test_the_accelerators_flavor_holds_for_later_programs(environ):
    accelerators.set_flavor(SMALL, environ)
    assert choose(environ, LAPTOP).name == "Small.4GB"


def test_the_environment_goes_before_the_accelerators_flavor(environ):
    accelerators.set_flavor(SMALL, environ)
    assert choose({**environ, "MOAI_FLAVOR": "Large"}, LAPTOP).name == "Large.16GB"


def test_a_flavor_that_is_gone_is_said(environ):
    accelerators.set_flavor(flavors.available(EIGHT_GPUS)[3], environ)
    with pytest.raises(ValueError, match=r"The flavor of accelerator 0, xLarge\.640GB.*Small\.4GB"):
        choose(environ, LAPTOP)


def test_a_flavor_whose_memory_has_changed_keeps_its_size(environ):
    accelerators.set_flavor(flavors.available(EIGHT_GPUS)[2], environ)
    assert choose(environ, LAPTOP).name == "Large.16GB"


def test_an_accelerator_is_configured_once_the_user_has_chosen(environ):
    assert not accelerators.configured(environ)
    assert accelerators.configured({**environ, "MOAI_FLAVOR": "Small"})
    assert accelerators.configured({**environ, "MOAI_DEVICES": "2"})
    assert accelerators.configured({**environ, "MOREH_VISIBLE_DEVICE": "0"})
    accelerators.set_flavor(SMALL, environ)
    assert accelerators.configured(environ)


def test_looking_at_the_accelerators_is_no_choice(environ):
    accelerators.accelerators(environ)
    assert not accelerators.configured(environ)


def test_asking_for_the_choice_leaves_no_files(environ, tmp_path):
    choose(environ, LAPTOP)
    accelerators.configured(environ)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_state_file_is_no_choice(environ):
    damage(environ)
    assert not accelerators.configured(environ)
    assert choose(environ, LAPTOP).name == "Medium.8GB"


def test_a_broken_state_file_is_said_to_who_has_named_an_accelerator(environ):
    damage(environ)
    with pytest.raises(StateError, match="damaged"):
        choose({**environ, "MOREH_VISIBLE_DEVICE": "1"}, LAPTOP)
