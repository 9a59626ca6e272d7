"""`torch.cuda` answers for the accelerator. The session is replaced: what is tested is what is asked of it and
reported."""

import sys
import types

import pytest
import torch

from moai.device import alias, rng, torch_cuda, torch_cuda_memory


class FakeSession:
    def __init__(self):
        self.calls = []
        self.figures = 3 << 30, 5 << 30, 160 << 30

    def acquire(self):
        self.calls.append("acquire")

    def synchronize(self):
        self.calls.append("synchronize")

    def memory(self):
        return self.figures


@pytest.fixture(autouse=True, scope="module")
def accelerator():
    assert alias.turn_on()


@pytest.fixture
def session(monkeypatch):
    fake = FakeSession()
    module = types.ModuleType("moai.session")
    module.current = lambda: fake
    monkeypatch.setitem(sys.modules, "moai.session", module)
    monkeypatch.setattr("moai.session", module, raising=False)
    monkeypatch.setattr(torch_cuda_memory, "_peak_at_reset", 0)
    return fake


def test_there_is_one_device_whatever_the_flavor():
    assert torch.cuda.is_available() and torch.cuda.is_initialized()
    assert torch.cuda.device_count() == 1
    assert torch.cuda.current_device() == 0


def test_asking_for_the_name_acquires_the_accelerator(session, monkeypatch):
    monkeypatch.delenv("MOAI_DEVICE_NAME", raising=False)
    assert torch.cuda.get_device_name() == "MoAI Accelerator"
    assert session.calls == ["acquire"]


def test_the_name_is_configurable(session, monkeypatch):
    monkeypatch.setenv("MOAI_DEVICE_NAME", "My Accelerator")
    assert torch.cuda.get_device_name(0) == "My Accelerator"


def test_properties_tell_the_size_of_the_flavor_and_acquire_nothing(session):
    properties = torch.cuda.get_device_properties("cuda:0")
    assert properties.total_memory == 160 << 30
    assert (properties.major, properties.minor) == torch.cuda.get_device_capability()
    assert "acquire" not in session.calls


@pytest.mark.parametrize(
    "ask", [torch_cuda.set_device, torch_cuda.get_device_name, torch_cuda.synchronize, torch_cuda.get_rng_state]
)
def test_a_second_device_is_refused(ask, session):
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        ask(1)


def test_device_contexts_accept_the_one_device(session):
    with torch.cuda.device(0), torch.cuda.device("cuda"), torch.cuda.device(torch.device("cuda:0")):
        assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="invalid device ordinal"), torch.cuda.device(1):
        pass


def test_synchronize_waits_for_the_session(session):
    torch.cuda.synchronize()
    torch.accelerator.synchronize()
    torch.cuda.current_stream().synchronize()
    assert session.calls == ["synchronize"] * 3


def test_memory_figures_are_the_sessions(session):
    assert torch.cuda.memory_allocated() == torch.cuda.memory.memory_reserved() == 3 << 30
    assert torch.cuda.max_memory_allocated() == 5 << 30
    assert torch.cuda.mem_get_info() == (157 << 30, 160 << 30)
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 5 << 30
    assert torch.accelerator.memory_allocated() == 3 << 30
    assert "163,840.0 MiB" in torch.cuda.memory_summary()
    torch.cuda.empty_cache()


def test_a_peak_from_before_the_reset_does_not_count(session):
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 3 << 30
    session.figures = 3 << 30, 7 << 30, 160 << 30
    assert torch.cuda.max_memory_allocated() == 7 << 30


def test_streams_nest(session):
    outer = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() is stream
        stream.wait_stream(outer)
        with torch.cuda.stream(None):
            assert torch.cuda.current_stream() is stream
    assert torch.cuda.current_stream() is outer


def test_timing_events_wait_for_the_work_before_them(session):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    end.record()
    assert session.calls == ["synchronize"] * 2
    assert 0 <= start.elapsed_time(end) < 1000


def test_events_without_timing_do_not_wait(session):
    event = torch.cuda.Event()
    event.record()
    torch.cuda.current_stream().wait_event(event)
    assert session.calls == []
    with pytest.raises(ValueError, match="enable_timing=True"):
        event.elapsed_time(event)


def test_nvtx_ranges_are_harmless():
    with torch.cuda.nvtx.range("forward"):
        torch.cuda.nvtx.mark("here")


def test_torch_manual_seed_reaches_the_accelerator():
    torch.manual_seed(11)
    first = rng.next_seed()
    assert torch.cuda.initial_seed() == 11
    torch.manual_seed(11)
    assert rng.next_seed() == first
    torch.cuda.manual_seed_all(12)
    assert rng.next_seed() != first


def test_the_random_state_is_saved_and_restored():
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state("cuda")
    states = torch.cuda.random.get_rng_state_all()
    seeds = [rng.next_seed() for _ in range(3)]
    torch.cuda.set_rng_state(state)
    assert [rng.next_seed() for _ in range(3)] == seeds
    torch.cuda.random.set_rng_state_all(states)
    assert rng.next_seed() == seeds[0]


def test_fork_rng_restores_the_accelerators_stream():
    torch.manual_seed(5)
    with torch.random.fork_rng():
        inside = rng.next_seed()
    assert rng.next_seed() == inside


def test_states_of_several_devices_are_refused():
    with pytest.raises(RuntimeError, match="One state is expected"):
        torch.cuda.set_rng_state_all([rng.get_state()] * 2)


def test_autocast_switches_of_cuda_are_the_accelerators():
    assert not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cuda") and torch.is_autocast_enabled()
        assert torch.get_autocast_dtype("cuda") == torch.get_autocast_gpu_dtype() == torch.bfloat16
        assert not torch.is_autocast_enabled("cpu")
        with torch.autocast("cuda", enabled=False):
            assert not torch.is_autocast_enabled("cuda")
    assert not torch.is_autocast_enabled("cuda")


def test_autocast_defaults_to_half_as_on_a_gpu():
    with torch.autocast("cuda"):
        assert torch.get_autocast_dtype("cuda") == torch.float16
    with pytest.warns(FutureWarning), torch.cuda.amp.autocast():
        assert torch.is_autocast_enabled("cuda")


def test_a_forked_process_cannot_use_the_device(monkeypatch):
    monkeypatch.setattr(torch_cuda, "_opened_in", -1)
    assert torch.cuda._is_in_bad_fork() and not torch.cuda.is_initialized()
    with pytest.raises(RuntimeError, match="'spawn'"):
        torch.cuda._lazy_init()


def test_cudnn_is_not_tried_on_the_accelerators_tensors(monkeypatch):
    """A torch that is built for CUDA says that cuDNN is there; nn.LSTM would hand it weights that are not."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "_init", lambda: True)
    assert not torch.backends.cudnn.is_acceptable(torch.ones(2, device="cuda"))
