"""Measuring real workers, and keeping what was measured."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch

from moai.graph.step_graph import Ref, flat_ids, map_args, refs
from moai.lower.on_meta import written
from moai.plan.work import OPERATORS
from moai.platform.device import Device
from moai.profiling import cases, store
from moai.profiling.measuring import STANDARD, Measurement, Sizes
from moai.profiling.stopwatch import Stopwatch
from moai.runtime.accelerator import Accelerator
from tests.runtime import programs

TINY = Sizes(("fp32",), (8, 16), (16,), (16,), (4096.0, 16384.0), (4096.0,), ("add", "gelu"))


@pytest.fixture(scope="module")
def accelerator():
    it = Accelerator([Device("cpu", i, 1 << 30, 1) for i in range(2)])
    yield it
    it.close()


@pytest.fixture
def environ(tmp_path):
    return {"XDG_CACHE_HOME": str(tmp_path)}


@pytest.fixture
def measured(accelerator):
    return Measurement(accelerator, store.hardware(accelerator.devices), TINY, Stopwatch(accelerator, 1e-4, 1)).run()


def test_devices_are_measured_and_found_again(accelerator, measured, environ):
    assert set(measured.tables) == {
        "matmul fp32",
        "attention forward fp32",
        "attention backward fp32",
        "stream add",
        "stream gelu",
        *(
            f"{kind} 2 {mode}"
            for kind in ("all_reduce", "all_gather", "reduce_scatter")
            for mode in ("waited", "started")
        ),
    }
    assert all(0.0 < s < 10.0 for table in measured.tables.values() for s in table.seconds)
    assert 0.0 < measured.call_s < 0.1
    file = store.save(measured, environ)
    assert store.find(accelerator.devices, environ) == measured
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_other_devices_were_not_measured(measured, environ):
    store.save(measured, environ)
    assert store.find([Device("cpu", i, 1 << 30, 1) for i in range(3)], environ) is None
    assert store.find([Device("cpu", i, 1 << 30, 7) for i in range(2)], environ) is None


def test_a_damaged_file_is_as_good_as_none_and_is_said(accelerator, environ, caplog):
    file = store.file_of(store.hardware(accelerator.devices), environ)
    file.parent.mkdir(parents=True)
    for text in ("{", "[]", "{}", "[" * 100_000):
        file.write_text(text)
        with caplog.at_level(logging.WARNING, "moai"):
            assert store.find(accelerator.devices, environ) is None
        assert "`moai profile` makes it anew" in caplog.messages[-1]


def test_a_file_that_cannot_be_written_leaves_nothing(measured, environ, monkeypatch):
    monkeypatch.setattr(json, "dump", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.save(measured, environ)
    assert not list(store.file_of(measured.hardware, environ).parent.iterdir())


def test_every_step_is_told(accelerator):
    told = []
    measurement = Measurement(accelerator, store.hardware(accelerator.devices), TINY, Stopwatch(accelerator, 1e-4, 1))
    measurement.run(lambda: told.append(1))
    assert len(told) == measurement.steps


def test_a_longer_body_takes_longer(accelerator):
    watch = Stopwatch(accelerator)
    small, large = (watch.of_case(cases.matmul(n, n, n, "fp32")) for n in (32, 256))
    assert large > 10 * small


def test_a_whole_program_is_timed_on_zeros(accelerator):
    x = programs.f32(64, 64)
    step = programs.increment(2, x)
    assert 0.0 < Stopwatch(accelerator, runs=2).of_program(step) < 1.0


def test_every_instruction_of_a_program_is_timed_whose_input_is_gone_after_a_run(accelerator):
    x = programs.f32(64, 64)
    step = programs.program(
        2,
        [programs.slot(0, x, donated=True)],
        [programs.slot(2, x)],
        programs.op("aten.mm.default", Ref(0), Ref(0), outs=1, frees=(0,)),
        programs.op("aten.add.Tensor", Ref(1), Ref(1), outs=2, frees=(1,)),
    )
    found = Stopwatch(accelerator, runs=2).of_instructions(step, [torch.zeros(64, 64)])
    assert [len(device) for device in found] == [2, 2]
    assert all(0.0 < seconds < 1.0 for device in found for seconds in device)


def run_here(case):
    """Bytes that a case's body reads and writes, as plain PyTorch on this process's tensors; views do not count."""
    values = dict(enumerate(case.tensors))
    moved = 0.0
    for each in case.body:
        op = torch.ops
        for part in each.op.split("."):
            op = getattr(op, part)
        filled = [map_args(a, lambda x: values[x.id] if isinstance(x, Ref) else x) for a in (each.args, each.kwargs)]
        out = op(*filled[0], **filled[1])
        results = [out] if isinstance(out, torch.Tensor) else list(out or ())
        values.update(zip(flat_ids(each.outs), results, strict=False))
        if not op.is_view:
            touched = [*(r.id for r in refs((each.args, each.kwargs))), *flat_ids(each.outs), *written(each)]
            moved += sum(values[i].nbytes for i in touched)
    return moved


@pytest.mark.parametrize("name", OPERATORS[1:])
def test_an_operators_case_moves_the_bytes_that_it_is_kept_under(name):
    nbytes = 16 << 20
    assert run_here(cases.operator(name, nbytes)) == pytest.approx(nbytes, rel=0.02)


def test_a_case_in_turn_does_its_work_on_tensors_of_their_own():
    once = cases.operator("native_layer_norm_backward", 1 << 16)
    often = cases.in_turn(once, 3)
    assert often.parts == 3 and len(often.tensors) == 3 * len(once.tensors)
    made = [i for each in often.body for i in flat_ids(each.outs)]
    assert len(set(made)) == len(made) and set(often.body[-1].frees) == set(made)
    assert run_here(often) == pytest.approx(3 * run_here(once))


def test_what_is_done_beside_is_not_counted(accelerator):
    watch = Stopwatch(accelerator, runs=3)
    case = cases.matmul(128, 128, 128, "fp32")
    assert watch.of_case(dataclasses.replace(case, beside=case)) < 0.5 * watch.of_case(case)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_attentions_case_moves_the_bytes_that_it_is_kept_under(backward, precision):
    _, nbytes = cases.attention_size(64, 256, precision, backward)
    assert run_here(cases.attention(64, 256, precision, backward)) == pytest.approx(nbytes, rel=0.02)


def test_a_products_case_has_its_three_directions():
    case = cases.matmul(3, 5, 7, "fp32")
    assert sum(each.op == "aten.mm.default" for each in case.body) == case.parts
    run_here(case)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_standard_sizes_make_grids(kind):
    sizes = STANDARD[kind]
    for axis in (sizes.lengths, sizes.sequences, sizes.rows, sizes.operators, sizes.messages):
        assert list(axis) == sorted(set(axis))
    assert set(sizes.names) == set(OPERATORS[1:])
    small = sizes.fitting(256 << 20)
    assert max(small.operators) <= 8 << 20 and np.all(small.lengths == sizes.lengths)
