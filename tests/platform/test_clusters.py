"""What hardware a flavor stands for."""

import pytest

from moai.platform import clusters, flavors
from moai.platform.errors import AcceleratorError
from moai.platform.pool import GB, MB, Machine

LAPTOP = Machine(cores=8, memory_bytes=23 * GB)


def node(n, memory, model):
    return Machine(64, 512 * GB, (memory,) * n, tuple(map(str, range(n))), (model,) * n)


def largest(machine, environ):
    return flavors.available(machine, environ)[-1]


def test_a_flavor_of_the_example_is_so_many_dies(environ):
    cluster = clusters.of_name("8xLarge.4096GB", environ)
    assert (cluster.name, cluster.nodes, cluster.devices_per_node) == ("mi250", 8, 8)
    assert cluster.device.memory_bytes == 65520 * MB


@pytest.mark.parametrize("name", [f.name for f in flavors.available(LAPTOP, {"MOAI_CONFIG": str(clusters.EXAMPLE)})])
def test_every_flavor_of_the_example_is_a_cluster(environ, name):
    offered = flavors.available(LAPTOP, {"MOAI_CONFIG": str(clusters.EXAMPLE)})
    assert clusters.of_name(name, environ).n_devices == flavors.find(name, offered).n_devices


def test_an_unknown_flavor_is_answered_with_those_on_offer(environ):
    with pytest.raises(AcceleratorError, match='no flavor "Huge"; there are Small'):
        clusters.of_name("Huge", environ)


def test_cpu_workers_are_one_node_and_have_the_rate_of_their_cores(environ):
    four, two = (clusters.of_flavor(flavors.of_count(n, (), LAPTOP), LAPTOP, environ) for n in (4, 2))
    assert (four.nodes, four.devices_per_node, four.device.memory_bytes) == (1, 4, 4 * GB)
    assert two.device.peak["fp32"] == 2 * four.device.peak["fp32"]


@pytest.mark.parametrize(
    ("model", "memory", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79 * GB, "h100"),
        ("NVIDIA H100 PCIe", 79 * GB, "h100"),
        ("NVIDIA A100-SXM4-40GB", 40 * GB, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 80 * GB, "a100-80"),
        ("NVIDIA GB200", 184 * GB, "gb200"),
        ("Tesla V100-SXM2-32GB", 32 * GB, "v100-32"),
    ],
)
def test_gpus_are_known_by_what_the_driver_calls_them(environ, model, memory, expected):
    machine = node(5, memory, model)
    cluster = clusters.of_flavor(largest(machine, environ), machine, environ)
    assert (cluster.name, cluster.nodes, cluster.devices_per_node) == (expected, 1, 5)
    assert cluster.device.memory_bytes == memory


def test_a_gpu_without_a_description_is_named_with_what_to_do(environ):
    machine = node(1, 24 * GB, "NVIDIA GeForce RTX 4090")
    with pytest.raises(AcceleratorError, match=r"no description of NVIDIA GeForce RTX 4090.*docs/clusters.md"):
        clusters.of_flavor(largest(machine, environ), machine, environ)


def test_the_operators_file_says_what_the_flavors_are(environ, tmp_path):
    file = tmp_path / "flavors.toml"
    file.write_text('cluster = "h100"\n[[flavor]]\nname = "Big.640GB"\ndevices = 16\nmemory_mib = 40960\n')
    cluster = clusters.of_name("big", {**environ, "MOAI_CONFIG": str(file)})
    assert (cluster.name, cluster.nodes, cluster.device.memory_bytes) == ("h100", 2, 40 * GB)
    file.write_text(file.read_text().replace("h100", "h1000"))
    with pytest.raises(AcceleratorError, match=r'flavors.toml, cluster: There is no cluster "h1000"'):
        clusters.of_name("big", {**environ, "MOAI_CONFIG": str(file)})
