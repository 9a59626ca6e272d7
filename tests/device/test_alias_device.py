"""`torch.device`: "cuda" is the accelerator, and everything else is as it was."""

import copy
import pickle

import pytest
import torch

from moai.device import alias
from tests.device import inline

DEVICE_TYPE = torch.device


@pytest.fixture(autouse=True, scope="module")
def accelerator():
    assert alias.turn_on()


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("cuda:0",), {}),
        (("cuda", 0), {}),
        ((0,), {}),
        ((), {"type": "cuda", "index": 0}),
        ((), {"device": "cuda:0"}),
    ],
)
def test_every_spelling_of_cuda_is_the_same_device(args, kwargs):
    assert torch.device(*args, **kwargs) == torch.device("cuda:0")
    assert hash(torch.device(*args, **kwargs)) == hash(torch.device("cuda:0"))


def test_a_device_says_that_it_is_cuda():
    device = torch.device("cuda:0")
    assert (device.type, device.index) == ("cuda", 0)
    assert str(device) == f"{device}" == "cuda:0"
    assert repr(device) == "device(type='cuda', index=0)"
    assert repr(torch.device("cuda")) == "device(type='cuda')"


def test_cuda_without_an_index_is_not_cuda_0_as_with_a_gpu():
    assert torch.device("cuda").index is None
    assert torch.device("cuda") != torch.device("cuda:0")


def test_the_type_of_devices_is_the_one_that_was_there_before():
    assert torch.device is DEVICE_TYPE
    assert type(torch.empty(0).device) is torch.device
    assert isinstance(torch.device("cuda"), DEVICE_TYPE)


def test_the_type_of_devices_is_immutable_again():
    with pytest.raises(TypeError, match="immutable"):
        torch.device.anything = 1


def test_other_devices_are_untouched():
    assert str(torch.device("cpu")) == "cpu"
    assert repr(torch.device("meta")) == "device(type='meta')"
    with pytest.raises(RuntimeError, match="at start of device string: gpu"):
        torch.device("gpu")


@pytest.mark.parametrize("args", [("cuda:1",), ("cuda", 1), (1,), ("cuda:7",)])
def test_a_second_device_is_refused_in_the_words_of_cuda(args):
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.device(*args)


def test_devices_are_copied_and_pickled():
    for device in (torch.device("cuda"), torch.device("cuda:0"), torch.device("cpu")):
        assert copy.deepcopy(device) == device
        assert pickle.loads(pickle.dumps(device)) == device


def test_a_pickled_device_opens_in_plain_torch():
    data = pickle.dumps(torch.device("cuda:0"))
    code = f"import pickle, torch; print(repr(pickle.loads({data!r})))"
    assert inline.said_by_plain_torch(code) == "device(type='cuda', index=0)"


def test_the_one_accelerator_of_torch_is_cuda():
    assert torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 1
    assert torch.accelerator.current_accelerator().type == "cuda"
    assert torch.get_device_module("cuda") is torch.cuda
    assert torch.get_device_module() is torch.cuda


def test_turning_the_alias_on_twice_changes_nothing():
    new = torch.device.__new__
    assert alias.turn_on() and alias.is_on()
    assert torch.device.__new__ is new
