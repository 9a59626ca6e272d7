"""`torch.moreh.option.enable_advanced_parallelization`: what it takes, and what it says about mistakes."""

import dataclasses

import pytest
import torch

import moreh
from moai.device import alias, options
from moai.plan.options import Options


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(options, "_current", None)


def test_the_script_reaches_it_by_every_spelling():
    assert torch.moreh.option is moreh.option
    from torch.moreh.option import enable_advanced_parallelization

    assert enable_advanced_parallelization is moreh.option.enable_advanced_parallelization


def test_nothing_is_in_force_before_the_script_asks():
    assert options.current() is None


def test_the_environment_asks_for_the_defaults_and_the_script_for_others():
    environ = {"MOREH_ENABLE_ADVANCED_PARALLELIZATION": "1"}
    assert options.current(environ) == Options()
    moreh.option.enable_advanced_parallelization(num_micro_batches=8)
    assert options.current(environ) == Options(num_micro_batches=8)


def test_asking_puts_the_defaults_in_force_and_turns_the_accelerator_on():
    torch.moreh.option.enable_advanced_parallelization()
    assert options.current() == Options(True, "auto", "auto", "auto", "auto", True)
    assert alias.is_on()


def test_given_options_are_kept():
    moreh.option.enable_advanced_parallelization(num_stages=4, num_micro_batches=8, distribute_parameter=False)
    assert options.current() == Options(num_stages=4, num_micro_batches=8, distribute_parameter=False)


def test_options_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().num_stages = 3


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"pipeline_parallel": "yes"}, TypeError, "True or False"),
        ({"mixed_precision": 1}, TypeError, "True or False"),
        ({"num_stages": 0}, ValueError, "1 or more, or 'auto'"),
        ({"num_stages": "two"}, ValueError, "1 or more, or 'auto'"),
        ({"num_stages": 2.0}, TypeError, "1 or more, or 'auto'"),
        ({"num_micro_batches": True}, TypeError, "1 or more, or 'auto'"),
        ({"activation_recomputation": "full"}, ValueError, "True, False or 'auto'"),
        ({"distribute_parameter": None}, TypeError, "True, False or 'auto'"),
        ({"pipeline_parallel": False, "num_stages": 4}, ValueError, "contradicts"),
        ({"tensor_parallel": True}, TypeError, "tensor_parallel"),
    ],
)
def test_a_mistake_is_told_with_what_is_allowed(wrong, error, says):
    with pytest.raises(error, match=says):
        moreh.option.enable_advanced_parallelization(**wrong)
    assert options.current() is None
