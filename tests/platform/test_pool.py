"""What counts as a device, and what each gets of the machine."""

import subprocess
import sys

import pytest

from moai.platform import pool
from moai.platform.pool import GB, MB, Machine


def test_four_cpu_workers_fit_in_eighty_percent_of_memory():
    devices = pool.discover(Machine(cores=8, memory_bytes=23 * GB))
    assert [d.kind for d in devices] == ["cpu"] * 4
    assert [d.memory_bytes for d in devices] == [4 * GB] * 4


def test_devices_share_the_cores():
    machine = Machine(cores=8, memory_bytes=64 * GB)
    assert [d.threads for d in pool.take(2, machine)] == [4, 4]
    assert [d.threads for d in pool.take(3, machine)] == [2, 2, 2]


def test_more_cpu_workers_than_cores_get_a_thread_each():
    assert [d.threads for d in pool.take(4, Machine(cores=2, memory_bytes=64 * GB))] == [1] * 4


def test_more_cpu_workers_than_the_default_get_smaller_budgets():
    machine = Machine(cores=2, memory_bytes=23 * GB)
    assert {d.memory_bytes for d in pool.take(4, machine)} == {4 * GB}
    assert {d.memory_bytes for d in pool.take(5, machine)} == {2 * GB}
    assert {d.memory_bytes for d in pool.take(32, machine)} == {512 * MB}


def test_fewer_cpu_workers_do_not_get_bigger_budgets():
    assert pool.take(1, Machine(cores=2, memory_bytes=23 * GB))[0].memory_bytes == 4 * GB


def test_cpu_workers_below_the_least_budget_are_refused():
    with pytest.raises(RuntimeError, match=r"no free device: 100 CPU worker.*The most that do is 73"):
        pool.take(100, Machine(cores=2, memory_bytes=23 * GB))


def test_a_small_machine_has_as_many_cpu_workers_as_fit():
    assert len(pool.discover(Machine(cores=2, memory_bytes=GB))) == 3


def test_cuda_devices_go_before_cpu_workers():
    devices = pool.discover(Machine(cores=16, memory_bytes=64 * GB, cuda_memory_bytes=(80 * GB, 80 * GB)))
    assert [(d.kind, d.index, d.memory_bytes, d.threads) for d in devices] == [
        ("cuda", 0, 80 * GB, 8),
        ("cuda", 1, 80 * GB, 8),
    ]


def test_more_cuda_devices_than_there_are_are_refused():
    with pytest.raises(RuntimeError, match=r"no free device: 3 were asked for and 2 CUDA"):
        pool.take(3, Machine(cores=16, memory_bytes=64 * GB, cuda_memory_bytes=(80 * GB, 80 * GB)))


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ("0", "1", "2")),
        ("", ()),
        ("2,0", ("2", "0")),
        ("1, GPU-8a, 0", ("1", "GPU-8a", "0")),
        ("0,7,1", ("0",)),  # CUDA ignores what follows an invalid entry
        ("-1", ()),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(visible, names):
    assert pool.visible_names(visible, 3) == names


def test_a_machine_where_torch_is_a_cpu_build_has_no_cuda_devices(monkeypatch):
    monkeypatch.setattr(pool, "_torch_has_cuda", lambda: False)
    monkeypatch.setattr(pool, "_nvml_devices", lambda visible: (("GPU-8a", 80 * GB),))
    assert pool.probe().cuda_memory_bytes == ()


def test_this_machine_has_devices():
    machine = pool.probe()
    assert machine.cores >= 1
    assert machine.memory_bytes > 0
    assert pool.discover(machine)


def test_choosing_a_flavor_does_not_import_torch():
    code = (
        "from moai.platform import accelerators; accelerators.choose(); import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
