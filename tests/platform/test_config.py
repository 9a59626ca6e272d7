"""What an operator writes about the platform."""

from pathlib import Path

import pytest

from moai.platform import accelerators, config, flavors, log
from moai.platform.errors import AcceleratorError
from moai.platform.pool import GB, MB, Machine

LAPTOP = Machine(cores=2, memory_bytes=23 * GB)
NODE = Machine(cores=96, memory_bytes=1024 * GB, cuda_memory_bytes=(65520 * MB,) * 8)
EXAMPLE = Path(config.__file__).with_name("flavors_mi250.toml")

FLAVOR = '[[flavor]]\nname = "Tiny.512MB"\ndevices = 2\nmemory_mib = 256\n'


@pytest.fixture
def written(tmp_path, environ):
    """A function that writes the file and returns the environment that names it."""

    def write(text):
        file = tmp_path / "flavors.toml"
        file.write_text(text)
        return {**environ, "MOAI_CONFIG": str(file)}

    return write


def test_without_a_file_nothing_is_configured(environ):
    assert config.load(environ) == config.Config()


def test_a_file_in_the_users_configuration_folder_is_found(environ):
    folder = Path(environ["XDG_CONFIG_HOME"]) / "moai"
    folder.mkdir(parents=True)
    (folder / "flavors.toml").write_text(FLAVOR)
    assert config.load(environ).flavors == (config.FlavorEntry("Tiny.512MB", 2, 256),)


def test_a_file_for_all_users_is_found(environ, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "SYSTEM_FILE", tmp_path / "system.toml")
    config.SYSTEM_FILE.write_text(FLAVOR)
    assert config.find(environ) == config.SYSTEM_FILE


def test_the_files_flavors_take_the_place_of_the_machines(written):
    (tiny,) = flavors.available(LAPTOP, written(FLAVOR))
    assert (tiny.name, tiny.size, tiny.n_devices, tiny.memory_bytes) == ("Tiny.512MB", "Tiny", 2, 512 * MB)
    assert accelerators.choose(written(FLAVOR), LAPTOP).flavor == tiny


def test_the_file_names_the_accelerator_and_the_versions(written):
    text = 'display_name = "Our Accelerator"\n[versions]\nserver = "2.1"\nlatest = "2.2"\n'
    loaded = config.load(written(text))
    assert (loaded.display_name, loaded.server_version, loaded.latest_version) == ("Our Accelerator", "2.1", "2.2")
    assert log.display_name(written(text)) == "Our Accelerator"
    assert log.display_name({**written(text), "MOAI_DEVICE_NAME": "Mine"}) == "Mine"


def test_the_example_has_the_flavors_of_the_original(environ):
    offered = flavors.available(NODE, {**environ, "MOAI_CONFIG": str(EXAMPLE)})
    assert [(f.name, f.n_devices, f.memory_bytes // MB) for f in offered] == [
        ("Small.64GB", 1, 65_520),
        ("Medium.128GB", 2, 131_040),
        ("Large.256GB", 4, 262_080),
        ("xLarge.512GB", 8, 524_160),
        ("1.5xLarge.768GB", 12, 786_240),
        ("2xLarge.1024GB", 16, 1_048_320),
        ("3xLarge.1536GB", 24, 1_572_480),
        ("4xLarge.2048GB", 32, 2_096_640),
        ("6xLarge.3072GB", 48, 3_144_960),
        ("8xLarge.4096GB", 64, 4_193_280),
        ("12xLarge.6144GB", 96, 6_289_920),
        ("24xLarge.12288GB", 192, 12_579_840),
        ("48xLarge.24576GB", 384, 25_159_680),
    ]


def test_the_default_of_a_file_is_what_uses_the_whole_machine(environ):
    example = {**environ, "MOAI_CONFIG": str(EXAMPLE)}
    assert accelerators.choose(example, NODE).flavor.name == "xLarge.512GB"


def test_a_flavor_larger_than_the_machine_is_offered_and_refused_to_programs(environ):
    example = {**environ, "MOAI_CONFIG": str(EXAMPLE), "MOAI_FLAVOR": "4xLarge"}
    with pytest.raises(RuntimeError, match="no free device: 32 were asked for and 8 CUDA"):
        accelerators.choose(example, NODE)
    with pytest.raises(RuntimeError, match="do not fit in 80% of this machine's"):
        accelerators.choose({**example, "MOAI_FLAVOR": "Small"}, LAPTOP)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("display_name = ", 1, "not valid TOML"),
        ('display_name = "A"\n\n[[flavor]\n', 3, "not valid TOML"),
        ('displayname = "A"', 1, "displayname is not known here; there are display_name, cluster, versions, flavor"),
        ("\ndisplay_name = 5", 2, "display_name must be a text"),
        ('[versions]\nserver = "1"\nlatest = 2', 3, "latest must be a text"),
        (FLAVOR + "\n[[flavor]]\ndevices = 2\nmemory_mib = 1", 6, "a flavor needs a name"),
        (FLAVOR + '\n[[flavor]]\nname = "B"\nmemory_mib = 1', 6, "a flavor needs devices"),
        (FLAVOR + '\n[[flavor]]\nname = "B"\ndevices = 0\nmemory_mib = 1', 8, "devices must be a whole number from 1"),
        (FLAVOR + '\n[[flavor]]\nname = "B"\ndevices = true\nmemory_mib = 1', 8, "devices must be a whole number"),
        (FLAVOR + '\n[[flavor]]\nname = "B"\ndevices = 1\nmemory_mib = "1"', 9, "memory_mib must be a whole number"),
        (FLAVOR + '\n[[flavor]]\nname = "B"\ndevices = 1\nmemory = 1', 9, "memory is not known here"),
        (FLAVOR + FLAVOR, 6, "there are two flavors named Tiny.512MB"),
        ("flavor = 3", 1, r"flavors are written as \[\[flavor\]\]"),
    ],
)
def test_a_broken_file_is_said_in_one_line_with_its_line(written, text, line, reason):
    environ = written(text)
    with pytest.raises(AcceleratorError, match=rf"{environ['MOAI_CONFIG']}.*{reason}") as error:
        config.load(environ)
    assert f"line {line}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_named_file_that_is_missing_is_said(environ):
    with pytest.raises(AcceleratorError, match=r"/nowhere\.toml cannot be read"):
        config.load({**environ, "MOAI_CONFIG": "/nowhere.toml"})
