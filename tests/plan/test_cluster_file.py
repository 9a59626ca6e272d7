"""Descriptions of clusters: those that come with the package, one's own, and broken ones."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moai.plan import cluster_file
from moai.plan.cluster import Constant

FILE = """
nodes = 2
devices_per_node = 4

[device]
name = "A device"
kind = "cuda"
memory_gib = 16
memory_bandwidth_gb_s = 900

[device.peak_tflops]
fp32 = 15.7
fp16 = 125

[inside]
bandwidth_gb_s = 150
latency_us = 2

[between]
bandwidth_gb_s = 6.25
latency_us = 4

[constants.matmul_efficiency]
value = 0.7
provenance = "fitted"
low = 0.3
high = 1.0
source = "rows"
"""


@pytest.fixture
def written(tmp_path):
    """A function that writes a file and returns its path as text."""

    def write(text):
        file = tmp_path / "mine.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return write


def refusal(text):
    with pytest.raises(ValueError) as caught:
        cluster_file.load(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_says_what_a_cluster_is(written):
    mine = cluster_file.load(written(FILE))
    assert (mine.name, mine.nodes, mine.devices_per_node, mine.n_devices) == ("mine", 2, 4, 8)
    assert (mine.device.memory_bytes, mine.device.memory_bandwidth) == (16 * 2**30, 900e9)
    assert mine.device.peak == {"fp32": 15.7e12, "fp16": 125e12}
    assert (mine.inside.bandwidth, mine.inside.latency_s) == (150e9, 2e-6)
    assert mine.constants == {"matmul_efficiency": Constant(0.7, "fitted", 0.3, 1.0, "rows")}


def test_a_file_needs_no_constants(written):
    assert cluster_file.load(written(FILE.partition("[constants")[0])).constants == {}


@pytest.mark.parametrize("name", cluster_file.names())
def test_every_cluster_that_is_shipped_can_be_loaded(name):
    cluster = cluster_file.load(name)
    assert cluster.name == name
    assert cluster.device.peak["fp32"] <= max(cluster.device.peak.values())
    assert cluster.between.bandwidth <= cluster.inside.bandwidth < cluster.device.memory_bandwidth


@pytest.mark.parametrize("name", cluster_file.names())
def test_every_figure_that_is_shipped_names_its_source(name):
    head, _, body = (cluster_file.SHIPPED / f"{name}.toml").read_text().partition("\n\n")
    sources = set(re.findall(r"^# (\[\w+\])", head, re.MULTILINE))
    assert len(sources) > 2
    for line in body.partition("[constants")[0].splitlines():
        figure = re.match(r"(\w+) = [\d.]+ *(.*)", line)
        if figure and figure[1] not in ("nodes", "devices_per_node"):
            named = set(re.findall(r"\[\w+\]", figure[2]))
            assert named and named <= sources, line


def test_a_die_of_an_mi250_is_a_device_and_has_half_of_its_data_sheet():
    die = cluster_file.load("mi250")
    assert die.device.peak["bf16"] == 181e12
    assert die.devices_per_node == 8


def test_a_name_or_a_path_with_a_number_is_that_many_devices(written):
    assert (cluster_file.load("h100:64").nodes, cluster_file.load("H100:64").devices_per_node) == (8, 8)
    assert (cluster_file.load("h100:2").nodes, cluster_file.load("h100:2").devices_per_node) == (1, 2)
    assert (cluster_file.load("mi250:12").nodes, cluster_file.load("mi250:12").devices_per_node) == (2, 6)
    assert cluster_file.load(f"{written(FILE)}:16").nodes == 4


def test_devices_that_make_no_equal_nodes_are_refused_with_the_numbers_that_do():
    assert "12 or 14" in refusal("h100:13")


@given(st.integers(1, 100_000))
def test_the_numbers_that_are_proposed_are_possible(n):
    h100 = cluster_file.load("h100")
    try:
        assert cluster_file.with_devices(h100, n).n_devices == n
    except ValueError as error:
        for near in re.findall(r"\d+", str(error).partition("that do: ")[2]):
            assert cluster_file.with_devices(h100, int(near)).n_devices == int(near)


def test_an_unknown_name_is_answered_with_the_nearest():
    assert 'Did you mean "h100"?' in refusal("h10")


@pytest.mark.parametrize(
    ("change", "key", "expected"),
    [
        (("nodes = 2\n", ""), "nodes", "is missing: a whole number from 1"),
        (("nodes = 2", "nodes = -2"), "nodes", "must be a whole number from 1 to 65536, not -2"),
        (("nodes = 2", "nodes = 2.5"), "nodes", "not 2.5"),
        (("nodes = 2", "nodes = true"), "nodes", "not True"),
        (("memory_gib", "memory_gb"), "device.memory_gb", 'is not known. Did you mean "memory_gib"?'),
        (("= 900", "= 900e9"), "device.memory_bandwidth_gb_s", "in GB/s (10**9 bytes a second), from 0.1 to 1e+06"),
        (("= 900", "= -900"), "device.memory_bandwidth_gb_s", "not -900"),
        (("= 900", '= "900"'), "device.memory_bandwidth_gb_s", "not '900'"),
        (("= 900", "= nan"), "device.memory_bandwidth_gb_s", "not finite"),
        (("= 900", f"= {'9' * 400}"), "device.memory_bandwidth_gb_s", "over 30 digits"),
        (('"cuda"', '"gpu"'), "device.kind", 'must be "cuda"'),
        (('"A device"', '""'), "device.name", "must be a text in quotes"),
        (("fp16 = 125", "bf61 = 125"), "device.peak_tflops.bf61", 'Did you mean "bf16"?'),
        (("fp32 = 15.7\n", ""), "device.peak_tflops.fp32", "is missing"),
        (("[between]", "[betwen]"), "betwen", 'Did you mean "between"?'),
        (("[between]\nbandwidth_gb_s = 6.25\nlatency_us = 4\n", "between = 3\n"), "inside.between", "is not known"),
        (("value = 0.7", "value = 1.7"), "constants.matmul_efficiency.value", "must lie between low, 0.3, and high, 1"),
        (('"fitted"', '"guessed"'), "constants.matmul_efficiency.provenance", "must be one of datasheet"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(written, change, key, expected):
    assert change[0] in FILE
    file = written(FILE.replace(*change))
    said = refusal(file)
    assert said.startswith(f"The cluster file {file}: {key} ")
    assert expected in said


def test_what_is_no_file_is_refused(tmp_path):
    assert "does not exist" in refusal(str(tmp_path / "none.toml"))
    assert "is no file" in refusal(str(tmp_path) + "/")
    assert "is no file" in refusal("/dev/zero")
    assert "no cluster" in refusal("")


def test_what_is_no_toml_is_refused(written):
    assert "is not valid TOML" in refusal(written("nodes = = 2"))
    assert "is not valid TOML" in refusal(written("nodes = " + "[" * 100_000))
    assert "cannot be read" in refusal(written(b"\xff\xfe"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def mutilated(draw):
    """The table of the file, with some of its values dropped or replaced by anything."""
    table = cluster_file.tomllib.loads(FILE)
    for _ in range(draw(st.integers(1, 3))):
        inner = table
        while (key := draw(st.sampled_from(sorted(inner)))) and isinstance(inner[key], dict) and inner[key]:
            if draw(st.booleans()):
                break
            inner = inner[key]
        if draw(st.booleans()) and len(inner) > 1:
            del inner[key]
        else:
            inner[draw(st.sampled_from([key, f"{key}x"]))] = draw(VALUES)
    return table


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutilated())
def test_no_table_ends_in_anything_but_a_value_error(tmp_path, monkeypatch, table):
    monkeypatch.setattr(cluster_file, "_table", lambda file: table)
    try:
        cluster = cluster_file.read(tmp_path / "mine.toml")
    except ValueError as error:
        assert str(error).startswith("The cluster file ")
        assert len(str(error)) < 500 + len(str(tmp_path))
    else:
        assert cluster.n_devices >= 1


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40), st.integers(0, len(FILE)), st.integers(0, 40))
def test_no_bytes_end_in_anything_but_a_value_error(written, junk, at, cut):
    text = FILE.encode()
    try:
        cluster_file.load(written(text[:at] + junk + text[at + cut :]))
    except ValueError as error:
        assert str(error).startswith("The cluster file ")


@given(st.text(max_size=20))
def test_no_name_ends_in_anything_but_a_value_error(text):
    try:
        cluster_file.load(text)
    except ValueError as error:
        assert str(error)
