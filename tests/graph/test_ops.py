"""Our own operators give the same whatever memory their arguments lie in."""

from __future__ import annotations

import pytest
import torch

import moai.graph.ops
from moai.graph.meta_kernels import meta_kernel

moai = torch.ops.moai


def columns_first(t: torch.Tensor) -> torch.Tensor:
    """The same content, with the last dim not the densest."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_reads_arguments_whose_rows_lie_apart(kv: int, masked: bool):
    torch.manual_seed(0)
    q, grad = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    k, v = torch.randn(2, kv, 6, 8), torch.randn(2, kv, 6, 8)
    mask = torch.randn(2, 1, 6, 6) if masked else None
    how = (mask, not masked, None, kv < 4)
    out, lse = moai.sdpa(q, k, v, *how)
    apart = [columns_first(t) for t in (q, k, v)]
    torch.testing.assert_close(moai.sdpa(*apart, *how), (out, lse))
    expected = moai.sdpa_backward(grad, q, k, v, out, lse, *how)
    torch.testing.assert_close(moai.sdpa_backward(columns_first(grad), *apart, columns_first(out), lse, *how), expected)


@pytest.mark.parametrize("batch", [(3,), (2, 3), (2, 1, 3)])
def test_a_product_takes_any_number_of_batch_dims(batch: tuple[int, ...]):
    a, b = torch.randn(*batch, 4, 5), torch.randn(*batch, 6, 5).mT
    found = moai.matmul(a, b)
    torch.testing.assert_close(found, a @ b)
    torch.testing.assert_close(moai.matmul(a.transpose(0, -2).contiguous().transpose(0, -2), b), found)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 4e-6), (torch.bfloat16, 6e-3)])
def test_gradients_of_shared_heads_add_up_in_fp32_or_better(dtype: torch.dtype, rounding: float):
    torch.manual_seed(0)
    sharing = 64
    q, grad = (torch.randn(2, sharing, 40, 8, dtype=dtype).double() for _ in range(2))
    k, v = (torch.randn(2, 1, 40, 8, dtype=dtype).double() for _ in range(2))

    def gradients(*tensors: torch.Tensor) -> list[torch.Tensor]:
        q, k, v, grad = tensors
        out, lse = moai.sdpa(q, k, v, None, True, None, k.shape[1] < q.shape[1])
        found = moai.sdpa_backward(grad, q, k, v, out, lse, None, True, None, k.shape[1] < q.shape[1])
        return [x.double() for x in found]

    dq, dk, dv = gradients(q, k.repeat(1, sharing, 1, 1), v.repeat(1, sharing, 1, 1), grad)
    expected = [dq, dk.sum(1, keepdim=True), dv.sum(1, keepdim=True)]
    for found, exact in zip(gradients(*(x.to(dtype) for x in (q, k, v, grad))), expected, strict=True):
        assert (found - exact).abs().max() <= rounding * exact.abs().max()


def test_random_numbers_without_data_are_not_drawn():
    size = (1 << 20, 1 << 20)  # 4 TiB
    random, randperm = torch.ops.moai.random.default, torch.ops.moai.randperm.default
    drawn = meta_kernel(random)(size, "normal", 0.0, 1.0, 1, 0, torch.float32)
    assert (drawn.shape, drawn.dtype, drawn.device.type) == (size, torch.float32, "meta")
    assert meta_kernel(randperm)(1 << 40, 1, torch.int64).shape == (1 << 40,)
