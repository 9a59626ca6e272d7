"""Which devices compute faster in bf16 than in fp32."""

import pytest
import torch

from moai.platform import precision
from moai.platform.device import Device

CPU = Device("cpu", 0, 2**30, 1)
GPU = Device("cuda", 0, 2**30, 1)


@pytest.fixture(autouse=True)
def fresh():
    precision._cpu.cache_clear()
    precision._cuda.cache_clear()
    yield
    precision._cpu.cache_clear()
    precision._cuda.cache_clear()


@pytest.mark.parametrize(
    ("features", "faster"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True, "avx512_bf16": False}, True), ({"avx512_f": True}, False)],
)
def test_a_processor_with_instructions_for_it_does(monkeypatch, features, faster):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert precision.bf16_is_faster(CPU) is faster


class Driver:
    """NVML with one GPU of compute capability `major`.0."""

    def __init__(self, major, failing=""):
        self.major, self.failing, self.shut = major, failing, False

    def __getattr__(self, name):
        def call(*arguments):
            if name == "nvmlDeviceGetCount_v2":
                arguments[0]._obj.value = 1
            elif name == "nvmlDeviceGetCudaComputeCapability":
                arguments[1]._obj.value = self.major
            elif name == "nvmlShutdown":
                self.shut = True
            return int(name == self.failing)

        return call


@pytest.mark.parametrize(("major", "faster"), [(7, False), (8, True), (9, True)])
def test_a_gpu_from_ampere_on_does(monkeypatch, major, faster):
    driver = Driver(major)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(precision.ctypes, "CDLL", lambda name: driver)
    assert precision.bf16_is_faster(GPU) is faster
    assert driver.shut


@pytest.mark.parametrize("failing", ["nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetCudaComputeCapability"])
def test_a_gpu_that_the_driver_does_not_tell_about_is_taken_for_an_old_one(monkeypatch, failing):
    monkeypatch.setattr(precision.ctypes, "CDLL", lambda name: Driver(9, failing))
    assert precision.bf16_is_faster(GPU) is False
