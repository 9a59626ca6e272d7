"""Attention's backward by products: the kernel's gradients, wherever it is worth trying, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moai.graph.step_graph import Ref
from moai.lower.program import Instruction
from moai.runtime import attention, inductor
from moai.runtime.attention import by_products, examples, is_causal_backward, is_for_products
from moai.runtime.executor import Executor
from moai.runtime.inductor import Compiler
from moai.runtime.layout import Layout
from tests.runtime.programs import f32, op, program, slot

CPU = torch.device("cpu")
moai = torch.ops.moai


def tensors(batch: int, heads: int, shared: int, tokens: int, width: int, scale: float | None) -> list[torch.Tensor]:
    """What the backward is given. Heads lie beside each other, as a script's view of a product has them."""
    torch.manual_seed(0)
    sizes = (heads, shared, shared)
    q, k, v = (torch.randn(batch, tokens, n, width).transpose(1, 2) for n in sizes)
    out, lse = moai.sdpa(q, k, v, None, True, scale, True)
    return [torch.randn_like(out), q, k, v, out, lse]


def backward(*args: object, outs: tuple[int | None, ...] = (6, 7, 8), **kwargs: object) -> Instruction:
    given = args or (*map(Ref, range(6)), None, True, None, True)
    return op("moai.sdpa_backward.default", *given, outs=outs, **kwargs)


@pytest.mark.parametrize("shared", [6, 2, 1])
@pytest.mark.parametrize("tokens", [32, 70])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("scores", [1, 10 * 6 * 32 * 70 * 4, 1 << 20])  # a pair at a time, some of them, all
def test_gradients_are_the_kernels_and_lie_like_its(
    shared: int, tokens: int, scale: float | None, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SCORES_BYTES", scores)
    given = tensors(3, 6, shared, tokens, 16, scale)
    expected = moai.sdpa_backward(*given, None, True, scale, True)
    found = by_products(given, scale)
    assert not given
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
        assert a.stride() == b.stride()


def test_large_scores_do_not_overflow() -> None:
    grad, q, k, v, *_ = tensors(1, 2, 2, 40, 16, None)
    q, k = 100 * q, 100 * k
    given = [grad, q, k, v, *moai.sdpa(q, k, v, None, True, None, True)]
    expected = moai.sdpa_backward(*given, None, True, None, True)
    torch.testing.assert_close(by_products(given), expected, rtol=1e-3, atol=1e-2)


def test_only_causal_attention_without_another_mask_is_computed_by_products() -> None:
    refs = tuple(map(Ref, range(6)))
    assert is_causal_backward(backward())
    assert is_causal_backward(backward(*refs, None, True, 0.5, False))
    assert not is_causal_backward(backward(*refs, Ref(9), True, None, True))
    assert not is_causal_backward(backward(*refs, None, False, None, True))
    assert not is_causal_backward(backward(*refs[:3], *refs[2:5], None, True, None, True))  # keys that are values
    assert not is_causal_backward(backward(outs=(6, None, 8)))
    assert not is_causal_backward(op("moai.sdpa.default", *refs[:3], None, True, None, True, outs=(6, 7)))


def test_only_float32_of_one_length_with_enough_work_is_worth_trying() -> None:
    given = tensors(1, 4, 2, 512, 16, None)
    assert is_for_products(given)
    assert not is_for_products([x.double() for x in given])
    assert not is_for_products([x[..., :500, :] if at == 1 else x for at, x in enumerate(given)])
    assert not is_for_products([x[:, :1] for x in given[:2]] + given[2:])  # less heads than keys
    assert not is_for_products(tensors(1, 4, 2, 32, 16, None))


def test_as_much_is_tried_as_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors(3, 4, 2, 32, 16, None)
    layouts = list(map(Layout.of, given))
    assert [x.shape for x in examples(layouts)] == [x.shape for x in given]
    monkeypatch.setattr(attention, "_TRIED_WORK", 1)
    few = examples(layouts)
    assert [x.shape[:2] for x in few] == [(1, 2), (1, 2), (1, 1), (1, 1), (1, 2), (1, 2)]
    assert [x.stride() for x in few] == [x.stride() for x in given]


@pytest.mark.parametrize("faster", [True, False])
def test_a_program_uses_products_where_they_are_faster(
    faster: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used: list[float | None] = []

    def counted(inputs: list[torch.Tensor], scale: float | None):
        used.append(scale)
        return by_products(inputs, scale)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inductor, "is_faster", lambda rival, plain, layouts: faster)
    monkeypatch.setattr(attention, "by_products", counted)
    given = tensors(1, 4, 2, 512, 16, 0.5)
    shapes = tuple(tuple(given[at].shape) for at in (1, 2, 3))
    p = program(
        1,
        [slot(at, f32(*x.shape)) for at, x in enumerate(given)],
        [slot(at, f32(*shape)) for at, shape in zip((6, 7, 8), shapes, strict=True)],
        backward(*map(Ref, range(6)), None, True, 0.5, True, shapes=shapes),
    )
    e = Executor(p, 0, CPU, None, Compiler(CPU, pytest.fail), "always")
    first, *others = (e.run(list(given), []) for _ in range(4))
    assert used == [0.5] * 2 * faster
    for found in others:
        torch.testing.assert_close(found, first, rtol=1e-5, atol=1e-4)
