"""Regions of a program are compiled when it pays, once each, and never change the numbers."""

from __future__ import annotations

import fcntl
import gc
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moai.graph.step_graph import Ref, TensorType
from moai.lower.program import Program
from moai.runtime import compiled, inductor
from moai.runtime.accelerator import Accelerator
from moai.runtime.compiled import Policy, ProgramRegions, policy
from moai.runtime.executor import Executor
from moai.runtime.inductor import Body, Compiler, cache_folder
from moai.runtime.layout import Layout
from tests.runtime.programs import cpus, f32, op, program, slot

CPU = torch.device("cpu")


class Fake:
    """Stands for Inductor: knows what was compiled, and runs the operators."""

    def __init__(self, off: float = 0.0) -> None:
        self.compiled: list[Body] = []
        self.called = 0
        self._off = off

    def __call__(self, body: Body, layouts: Sequence[Layout], device: torch.device):
        self.compiled.append(body)

        def function(inputs: list[torch.Tensor]):
            self.called += 1
            outputs = [x + self._off for x in body(inputs)]
            inputs.clear()
            return outputs

        return function


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = Fake()
    monkeypatch.setattr(inductor, "_compiled", found)
    return found


@pytest.fixture
def said() -> list[str]:
    return []


def layers(n: int) -> Program:
    """`n` times: a product, then a region."""
    code = []
    for at in range(0, 3 * n, 3):
        code += [
            op("aten.mm.default", Ref(at), Ref(at), outs=at + 1, frees=(at,) if at else (), shapes=((4, 4),)),
            op("aten.tanh.default", Ref(at + 1), outs=at + 2, frees=(at + 1,), shapes=((4, 4),)),
            op("aten.mul.Scalar", Ref(at + 2), 0.5, outs=at + 3, frees=(at + 2,), shapes=((4, 4),)),
        ]
    return program(1, [slot(0, f32(4, 4))], [slot(3 * n, f32(4, 4))], *code)


def executor(p: Program, said: list[str], wanted: Policy = "always") -> Executor:
    return Executor(p, 0, CPU, None, Compiler(CPU, said.append), wanted)


def outputs_of(e: Executor, *inputs: torch.Tensor, runs: int = 4) -> list[torch.Tensor]:
    """The first outputs of some runs."""
    return [e.run([x.clone() for x in inputs], [])[0] for _ in range(runs)]


def test_equal_regions_are_compiled_once(fake: Fake, said: list[str]) -> None:
    x = torch.randn(4, 4)
    first, *others = outputs_of(executor(layers(3), said), x)
    assert len(fake.compiled) == 1
    assert all(torch.equal(y, first) for y in others)


def test_compiled_code_runs_from_the_third_run_on_if_the_user_wants_it(fake: Fake, said: list[str]) -> None:
    e = executor(layers(2), said)
    calls = []
    for _ in range(4):
        outputs_of(e, torch.randn(4, 4), runs=1)
        calls.append(fake.called)
    assert calls == [0, 0, 2, 4]


def test_nothing_is_compiled_if_the_user_forbids_it(fake: Fake, said: list[str]) -> None:
    e = executor(layers(2), said, "never")
    outputs_of(e, torch.randn(4, 4))
    assert not fake.compiled


def test_compiling_begins_when_it_would_have_paid_by_now(fake: Fake, said: list[str]) -> None:
    compiler = Compiler(CPU, said.append)
    e = Executor(layers(2), 0, CPU, None, compiler)
    regions = e._regions
    assert isinstance(regions, ProgramRegions)
    outputs_of(e, torch.randn(4, 4))
    assert not fake.compiled  # milliseconds were spent so far
    regions.ran(1000.0)
    until = time.monotonic() + 10
    while not fake.called and time.monotonic() < until:
        outputs_of(e, torch.randn(4, 4), runs=1)
    assert fake.called and len(fake.compiled) == 1


def test_what_is_on_disk_is_cheaper_to_have(fake: Fake, said: list[str]) -> None:
    first, second = Compiler(CPU, said.append), Compiler(CPU, said.append)
    body = only_body(layers(1))
    layout = (Layout.of(torch.randn(4, 4)),)
    before = second.cost([second.job(body, layout)])
    job = first.job(body, layout)
    first.submit([job])
    assert job.done.wait(10)
    assert first.cost([job]) == 0 < second.cost([second.job(body, layout)]) < before


def only_body(p: Program) -> Body:
    regions = Executor(p, 0, CPU, None, Compiler(CPU, print))._regions
    assert regions
    (body,) = regions._bodies.values()
    return body


def in_place() -> Program:
    x = slot(0, f32(3, 4), donated=True)
    return program(
        1,
        [x, slot(1, f32(3, 4))],
        [slot(0, f32(3, 4), replaces=0), slot(2, f32(3, 4))],
        op("aten.add_.Tensor", Ref(0), Ref(1)),
        op("aten.exp.default", Ref(0), outs=2, shapes=((3, 4),)),
    )


def test_what_is_written_in_place_stays_the_same_tensor(fake: Fake, said: list[str]) -> None:
    e, x, y = executor(in_place(), said), torch.zeros(3, 4), torch.ones(3, 4)
    for n in range(1, 6):
        out, exp = e.run([x, y], [])
        assert out is x and torch.equal(x, torch.full((3, 4), float(n))) and torch.equal(exp, x.exp())
    assert fake.called == 3


def test_what_is_written_through_a_view_is_known_to_be(fake: Fake, said: list[str]) -> None:
    p = program(
        1,
        [slot(0, f32(2, 3), donated=True)],
        [slot(0, f32(2, 3), replaces=0), slot(2, f32(3, 2))],
        op("aten.permute.default", Ref(0), (1, 0), outs=1, shapes=((3, 2),)),
        op("aten.add_.Scalar", Ref(1), 1.0),
        op("aten.exp.default", Ref(1), outs=2, frees=(1,), shapes=((3, 2),)),
    )
    e, x = executor(p, said), torch.zeros(2, 3)
    for n in range(1, 6):
        (x, y) = e.run([x], [])
        assert torch.equal(x, torch.full((2, 3), float(n))) and torch.equal(y, x.t().exp())
    assert fake.called == 3 and not said


def test_what_shares_memory_with_a_written_tensor_is_not_compiled(fake: Fake, said: list[str]) -> None:
    p = program(
        1,
        [slot(0, f32(4), donated=True)],
        [slot(0, f32(4), replaces=0), slot(3, f32(2))],
        op("aten.split.Tensor", Ref(0), 2, outs=(1, 2)),
        op("aten.exp.default", Ref(1), outs=3, shapes=((2,),)),
        op("aten.mul_.Scalar", Ref(0), 2.0, frees=(1, 2)),
    )
    outputs_of(executor(p, said), torch.ones(4))
    assert not fake.compiled


def test_code_that_gives_other_numbers_is_left_out_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, fake: Fake, said: list[str]
) -> None:
    monkeypatch.setattr(inductor, "_compiled", Fake(off=0.1))
    first, *others = outputs_of(executor(layers(3), said), torch.randn(4, 4))
    assert all(torch.equal(y, first) for y in others)
    (text,) = said
    assert "other numbers" in text and "MOAI_COMPILE=never" in text


def test_large_results_are_compared_by_samples_of_every_column() -> None:
    x = torch.arange(300.0).expand(400, 300)
    sample = compiled._sample(x)
    assert sample.numel() < x.numel() / 50
    assert set(sample.tolist()) == set(range(300))


@pytest.mark.parametrize(("through", "accepted"), [(torch.float32, True), (torch.float64, False)])
def test_what_goes_through_coarser_floats_may_differ_more(
    through: torch.dtype, accepted: bool, monkeypatch: pytest.MonkeyPatch, fake: Fake, said: list[str]
) -> None:
    monkeypatch.setattr(inductor, "_compiled", Fake(off=1e-6))
    f64 = TensorType((4,), torch.float64)
    p = program(
        1,
        [slot(0, f64)],
        [slot(2, f64)],
        op("aten._to_copy.default", Ref(0), outs=1, shapes=((4,),), dtype=through),
        op("aten._to_copy.default", Ref(1), outs=2, frees=(1,), shapes=((4,),), dtype=torch.float64),
    )
    outputs_of(executor(p, said), torch.ones(4, dtype=torch.float64))
    assert bool(said) is not accepted


def test_what_cannot_be_compiled_runs_as_it_is_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, fake: Fake, said: list[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(inductor, "_compiled", fails)
    e = executor(layers(2), said)
    first, *others = outputs_of(e, torch.randn(4, 4))
    assert all(torch.equal(y, first) for y in others)
    outputs_of(executor(in_place(), said), torch.zeros(3, 4), torch.ones(3, 4), runs=1)
    (text,) = said
    assert "(RuntimeError: no C++ compiler)" in text


def test_tensors_that_lie_otherwise_than_expected_are_computed_by_operators(fake: Fake, said: list[str]) -> None:
    e = executor(in_place(), said)
    outputs_of(e, torch.zeros(3, 4), torch.ones(3, 4))
    called = fake.called
    x, _ = e.run([torch.zeros(4, 3).t(), torch.ones(3, 4)], [])
    assert torch.equal(x, torch.ones(3, 4)) and fake.called == called


def test_what_dies_in_a_region_is_gone_behind_it(fake: Fake, said: list[str]) -> None:
    gone: list[bool] = []

    class Watched(Executor):
        def _timed_run(self, inputs, scalars):
            x = weakref.ref(inputs[0])
            outputs = super()._timed_run(inputs, scalars)
            gc.collect(1)  # what is young
            gone.append(x() is None)
            return outputs

    p = program(
        1,
        [slot(0, f32(4, 4), donated=True)],
        [slot(2, f32(4, 4))],
        op("aten.exp.default", Ref(0), outs=1, frees=(0,), shapes=((4, 4),)),
        op("aten.neg.default", Ref(1), outs=2, frees=(1,), shapes=((4, 4),)),
    )
    e = Watched(p, 0, CPU, None, Compiler(CPU, said.append), "always")
    for _ in range(5):
        e.run([torch.randn(4, 4)], [])
    assert all(gone) and fake.called == 3


def gated() -> Program:
    """The second region computes again what the first one makes."""
    square = ((4, 4),)
    return program(
        1,
        [slot(0, f32(4, 4)), slot(1, f32(4, 4))],
        [slot(6, f32(4, 4))],
        op("aten.silu.default", Ref(0), outs=2, shapes=square),
        op("aten.mul.Tensor", Ref(2), Ref(1), outs=3, shapes=square),
        op("aten.mm.default", Ref(3), Ref(1), outs=4, frees=(3,), shapes=square),
        op("aten.mul.Tensor", Ref(4), Ref(2), outs=5, frees=(2, 4), shapes=square),
        op("aten.mul.Tensor", Ref(5), Ref(0), outs=6, frees=(5,), shapes=square),
    )


def test_what_is_computed_again_is_not_put_out(fake: Fake, said: list[str]) -> None:
    first, *others = outputs_of(executor(gated(), said), torch.randn(4, 4), torch.randn(4, 4))
    assert all(torch.equal(y, first) for y in others) and not said
    makes, reads = fake.compiled
    assert makes.region.outputs == (3,) and reads.region.again == (0,)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_region_may_fail_though_another_counts_on_it(
    broken: int, fake: Fake, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled_but_one(body: Body, layouts: Sequence[Layout], device: torch.device):
        if len(fake.compiled) == broken:
            fake.compiled.append(body)
            raise RuntimeError("too hard")
        return fake(body, layouts, device)

    monkeypatch.setattr(inductor, "_compiled", compiled_but_one)
    first, *others = outputs_of(executor(gated(), said), torch.randn(4, 4), torch.randn(4, 4))
    assert all(torch.equal(y, first) for y in others)
    assert fake.called == 2 and len(said) == 1


def test_a_region_that_fails_is_named(fake: Fake, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    e = executor(layers(2), said)
    outputs_of(e, torch.randn(4, 4))

    def broken(self: object, inputs: object) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(compiled.CompiledRegion, "__call__", broken)
    with pytest.raises(RuntimeError, match=r"aten.tanh.default \(instruction 1 of .* illegal instruction"):
        outputs_of(e, torch.randn(4, 4), runs=1)


def test_who_holds_a_regions_lock_for_too_long_is_not_waited_for(
    fake: Fake, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "_LOCK_SECONDS", 0.2)
    compiler = Compiler(CPU, said.append)
    job = compiler.job(only_body(layers(1)), (Layout.of(torch.randn(4, 4)),))
    lock = compiler._mark(f"{job.key}.lock")
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        compiler.submit([job])
        assert not job.done.wait(0.1)
        assert job.done.wait(10)
    assert job.function is not None


def test_the_cache_is_where_the_user_keeps_caches() -> None:
    assert cache_folder({"TORCHINDUCTOR_CACHE_DIR": "/a"}) == Path("/a")
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/moai/inductor")
    assert cache_folder({}) == Path.home() / ".cache/moai/inductor"


def test_an_unknown_policy_is_refused_before_devices_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert policy({}) == "auto" and policy({"MOAI_COMPILE": "never"}) == "never"
    monkeypatch.setenv("MOAI_COMPILE", "yes")
    with pytest.raises(ValueError, match="MOAI_COMPILE is 'yes': it can be always, never or auto"):
        Accelerator(cpus(1))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_inductors_code_gives_the_plain_numbers(
    dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: list[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    called: list[int] = []
    real = inductor._compiled

    def counted(body: Body, layouts: Sequence[Layout], device: torch.device):
        function = real(body, layouts, device)
        return lambda inputs: (called.append(1), function(inputs))[1]

    monkeypatch.setattr(inductor, "_compiled", counted)
    p = program(
        1,
        [slot(0, f32(8, 16), donated=True), slot(1, f32(16))],
        [slot(0, f32(8, 16), replaces=0), slot(6, f32(16, 8)), slot(7, f32(1, 16))],
        op("aten.mul_.Tensor", Ref(0), Ref(1)),
        op("aten._softmax.default", Ref(0), 1, False, outs=3, shapes=((8, 16),)),
        op("aten.permute.default", Ref(3), (1, 0), outs=4, shapes=((16, 8),)),
        op("aten.silu.default", Ref(4), outs=6, shapes=((16, 8),)),
        op("aten.sum.dim_IntList", Ref(3), (0,), True, outs=7, frees=(3, 4), shapes=((1, 16),)),
    )
    slots = [tuple(replace(s, type=replace(s.type, dtype=dtype)) for s in some) for some in (p.inputs, p.outputs)]
    p = replace(p, inputs=slots[0], outputs=slots[1])
    e = executor(p, said)
    torch.manual_seed(0)
    given = torch.randn(8, 16, dtype=dtype), torch.rand(16, dtype=dtype)
    plain = e.run([x.clone() for x in given], [])
    for _ in range(4):
        found = e.run([x.clone() for x in given], [])
        torch.testing.assert_close(found, plain, rtol=error, atol=error)
    assert len(called) == 3 and not said
