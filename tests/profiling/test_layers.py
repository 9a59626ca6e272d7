"""What is timed of a model's layers on real workers predicts what its steps take."""

import pytest

from moai.lower.sampling import few_layers
from moai.plan.parse import parse
from moai.platform.device import Device
from moai.profiling import layers
from moai.profiling.layers import LayerMeasurement
from moai.profiling.stopwatch import Stopwatch
from moai.runtime.accelerator import Accelerator
from tests.capture.conftest import capture, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import VOCABULARY, capturing, llama_with_adamw

SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def accelerator():
    it = Accelerator([Device("cpu", i, 1 << 30, 1) for i in range(2)])
    yield it
    it.close()


@pytest.fixture
def graph(capture, monkeypatch):  # noqa: F811
    return capturing(capture, monkeypatch)(llama_with_adamw(4, 32, **SIZES, **HEADS, num_hidden_layers=6)).graph


class Even:
    """A stopwatch on which every instruction takes a second, whatever it is."""

    def of_instructions(self, program, tensors):
        return [(1.0,) * len(program.instructions)] * 2


def of_program(few, tasks):
    """What the tasks of a program take in all."""
    seconds = {task.which: task.seconds for task in tasks}
    groups = [few.program.mesh.sizes.get(task.axis, 1) for task in few.tasks]
    each = [seconds[layers.timed(task, 0.0, group)] for task, group in zip(few.tasks, groups, strict=True)]
    return sum(s * (few.program.mesh.steps if task.looped else 1) for s, task in zip(each, few.tasks, strict=True))


@pytest.mark.parametrize("text", ["dp=2", "dp=2,micro=2", "tp=2,micro=4", "dp=2,distribute_param=true"])
def test_the_tasks_of_a_program_take_what_its_instructions_do(accelerator, graph, monkeypatch, text):
    monkeypatch.setattr(layers, "_shapes", lambda *_: [parse(text, 2)])
    told = []
    measurement = LayerMeasurement(accelerator, graph, None, Even())
    tasks = measurement.run(lambda: told.append(1))
    assert len(told) == measurement.steps == layers.ROUNDS
    few = few_layers(graph, parse(text, 2))
    assert of_program(few, tasks) == pytest.approx(sum(at is not None for at in few.at))


def test_on_real_workers_they_take_about_what_a_step_does(accelerator, graph, monkeypatch):
    plan = parse("dp=2,micro=2", 2)
    monkeypatch.setattr(layers, "_shapes", lambda *_: [plan])
    few = few_layers(graph, plan)
    predicted = of_program(few, LayerMeasurement(accelerator, graph, None).run())
    whole = Stopwatch(accelerator, runs=9).of_program(few.program, (), layers.made_up(few.program))
    assert 1 / 3 < predicted / whole < 3  # other programs take their share of so small a step


def test_the_devices_layers_are_timed_in_every_shape_once(accelerator, graph):
    plans = list(layers._shapes(2, 4, None))
    assert len(plans) == len(set(plans)) == 2 * 3 + 3  # dp=2 with 1 or 2 micro-batches, and tp=2 with 1, 2 or 4
    assert all(plan.recompute == "none" for plan in plans)
    assert len(layers._spread(plans * 10)) == layers._MOST


def test_a_model_whose_layers_fit_nowhere_is_refused(graph):
    class Small:
        devices = (Device("cpu", 0, 1000, 1),)
        n_devices = 1

    with pytest.raises(RuntimeError, match="Not even a few layers"):
        LayerMeasurement(Small(), graph, None)
