"""Products are oneDNN's where that is faster on this machine: found out once, for plain products of float32 alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moai.graph.step_graph import Ref
from moai.lower.program import Program
from moai.runtime import inductor, products, rivals
from moai.runtime.executor import Executor
from moai.runtime.inductor import Compiler
from moai.runtime.layout import Layout
from moai.runtime.products import by_onednn, examples, is_for_onednn, is_product
from tests.runtime.programs import f32, op, program, slot

CPU = torch.device("cpu")
SIDE = 192  # enough work for it to matter

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, ...]]:
    """The sizes of the second factors that were tried; oneDNN is always faster."""
    found: list[tuple[int, ...]] = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inductor, "is_faster", lambda rival, plain, layouts: found.append(layouts[-1].shape) or True)
    return found


@pytest.fixture
def by_others(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each product that is oneDNN's."""
    calls: list[int] = []

    def counted(inputs: list[torch.Tensor]) -> tuple[torch.Tensor]:
        calls.append(1)
        return by_onednn(inputs)

    monkeypatch.setattr(products, "by_onednn", counted)
    return calls


def layers() -> Program:
    """x @ w, and with a bias; w lies the other way round then."""
    w = (Ref(1), (1, 0))
    return program(
        1,
        [slot(0, f32(SIDE, SIDE)), slot(1, f32(SIDE, SIDE)), slot(2, f32(SIDE))],
        [slot(5, f32(SIDE, SIDE))],
        op("aten.mm.default", Ref(0), Ref(1), outs=3, shapes=((SIDE, SIDE),)),
        op("aten.permute.default", *w, outs=4, shapes=((SIDE, SIDE),)),
        op("aten.addmm.default", Ref(2), Ref(3), Ref(4), outs=5, frees=(3, 4), shapes=((SIDE, SIDE),)),
    )


def runs(dtype: torch.dtype = torch.float32, n: int = 4) -> list[torch.Tensor]:
    e = Executor(_cast(layers(), dtype), 0, CPU, None, Compiler(CPU, pytest.fail), "always")
    torch.manual_seed(0)
    given = [torch.randn(SIDE, SIDE, dtype=dtype), torch.randn(SIDE, SIDE, dtype=dtype), torch.randn(SIDE, dtype=dtype)]
    return [e.run(list(given), [])[0] for _ in range(n)]


def _cast(p: Program, dtype: torch.dtype) -> Program:
    inputs, outputs = (
        tuple(replace(s, type=replace(s.type, dtype=dtype)) for s in slots) for slots in (p.inputs, p.outputs)
    )
    return replace(p, inputs=inputs, outputs=outputs)


def test_the_faster_library_gives_the_same_numbers(tried: list[tuple[int, ...]], by_others: list[int]) -> None:
    plain, *others = runs()
    assert tried == [(SIDE, SIDE)] * 2 and len(by_others) == 4
    for each in others:
        torch.testing.assert_close(each, plain, rtol=1e-4, atol=1e-2)


def test_what_was_found_out_stays(tried: list[tuple[int, ...]], by_others: list[int]) -> None:
    runs()
    runs()
    assert len(tried) == 2 and len(by_others) == 8


def test_where_blas_is_as_fast_it_stays(
    tried: list[tuple[int, ...]], by_others: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "is_faster", lambda rival, plain, layouts: False)
    first, *others = runs()
    assert not by_others and all(torch.equal(each, first) for each in others)


def test_float64_is_left_to_blas(tried: list[tuple[int, ...]], by_others: list[int]) -> None:
    first, *others = runs(torch.float64)
    assert not tried and not by_others and all(torch.equal(each, first) for each in others)


def test_only_products_of_dense_factors_are_worth_trying() -> None:
    a, b, bias = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE), torch.ones(SIDE)
    assert is_for_onednn([a, b]) and is_for_onednn([a, b.t()]) and is_for_onednn([bias, a, b])
    assert not is_for_onednn([a.t(), b])
    assert not is_for_onednn([a, torch.ones(2 * SIDE, SIDE)[::2]])
    assert not is_for_onednn([torch.ones(SIDE, SIDE), a, b])
    assert not is_for_onednn([a[:4], b])  # too little work


def test_a_product_that_writes_or_scales_is_not_plain() -> None:
    assert is_product(op("aten.addmm.default", Ref(0), Ref(1), Ref(2), outs=3))
    assert not is_product(op("aten.addmm.default", Ref(0), Ref(1), Ref(2), outs=3, beta=2))
    assert not is_product(op("aten.mm.out", Ref(0), Ref(1), out=Ref(2)))
    assert not is_product(op("aten.mm.default", Ref(0), Ref(0), outs=1))


def test_products_are_tried_as_they_lie_but_no_larger_than_needed() -> None:
    given = [torch.ones(5), torch.ones(products._LONGEST + 1, 3), torch.ones(5, 3).t()]
    bias, a, b = examples(list(map(Layout.of, given)))
    assert bias.shape == (5,) and a.shape == (products._LONGEST, 3)
    assert b.shape == (3, 5) and b.stride() == given[2].stride()


def test_rivals_are_tried_in_turns() -> None:
    order: list[str] = []
    rivals._least_seconds(lambda: order.append("a"), lambda: order.append("b"))
    assert order[:4] == ["a", "b", "a", "b"] and len(order) >= 10
