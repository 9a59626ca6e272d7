"""Views, writes and shared storages: what a script does to memory comes out as on one device."""

from __future__ import annotations

import pytest
import torch

from tests.capture.compare import randn, same_as_cpu

# ---------------------------------------------------------------------- writing through views


@same_as_cpu
def test_slices_can_be_assigned(device):
    x = randn(4, 5).to(device)
    x[1:3] = 2
    x[:, 2] += 1
    x[0, 0] = 9
    x[::2, 1::2] *= 3
    return x


@same_as_cpu
def test_a_write_through_one_view_is_seen_by_another(device):
    x = randn(4, 6).to(device)
    a, b = x.chunk(2, 1)
    a.mul_(2)
    b.copy_(a)
    return x, a, b


@same_as_cpu
def test_views_of_views_write_to_the_base(device):
    x = randn(4, 6).to(device)
    y = x.t()[1:4].unsqueeze(0).permute(2, 1, 0)
    y.add_(1)
    y[0] = 5
    return x, y


@same_as_cpu
def test_a_view_follows_its_base_across_a_read(device):
    x = randn(4, 6).to(device)
    v = x[1:3].t()
    before = v.sum().item()
    x.add_(1)
    after = v.sum().item()
    v.zero_()
    return x, v, before, after


@same_as_cpu
def test_a_view_outlives_its_base(device):
    x = randn(4, 6).to(device)
    v = x[1]
    del x
    v.add_(1)
    v.sum().item()
    v.mul_(2)
    return v


@same_as_cpu
def test_an_operand_is_broadcast_into_a_write(device):
    x = randn(4, 5).to(device)
    x += randn(5, seed=1).to(device)
    x.mul_(x[0].clone())
    x[1:].copy_(randn(5, seed=2).to(device))
    return x


@same_as_cpu
def test_strided_windows_are_written(device):
    x = randn(12).to(device)
    x.as_strided((3, 3), (3, 1), 1).add_(1)
    x.as_strided((2, 2), (7, 2), 0).zero_()
    return x


@same_as_cpu
def test_a_write_to_an_expanded_source_is_seen_through_it(device):
    x = randn(3, 1).to(device)
    e = x.expand(3, 4)
    x.add_(1)
    return e + 0, e


@same_as_cpu
def test_copying_into_an_expanded_tensor_writes_its_source(device):
    x = torch.zeros(3, 1).to(device)
    x.expand(3, 4)[:, :1].copy_(randn(3, 1).to(device))
    return x


@pytest.mark.filterwarnings("ignore:Use of masked_fill_ on expanded tensors")
@same_as_cpu
def test_filling_an_expanded_tensor_writes_its_source(device):
    x = randn(3, 1).to(device)
    x.expand(3, 4).masked_fill_(torch.tensor([[True], [False], [True]]).to(device), 5.0)
    return x


@same_as_cpu
def test_overlapping_windows_are_read(device):
    x = randn(8).to(device)
    windows = x.unfold(0, 3, 1)
    x[2] = 7
    return windows.sum(1), windows


@same_as_cpu
def test_the_diagonal_is_written(device):
    x = randn(4, 4).to(device)
    x.diagonal().fill_(3)
    x.fill_diagonal_(1)
    return x


@same_as_cpu
def test_a_view_of_another_dtype_reads_and_writes_the_bytes(device):
    x = randn(4).to(device)
    bits = x.view(torch.int32)
    bits.bitwise_and_(0x7FFFFFFF)
    return bits + 0, x


@same_as_cpu
def test_contiguous_and_reshape_copy_only_where_torch_does(device):
    x = randn(3, 4).to(device)
    x.contiguous().add_(1)
    x.t().contiguous().add_(1)
    x.reshape(12).add_(1)
    x.t().reshape(12).add_(1)
    return x


@same_as_cpu
def test_to_copies_only_where_torch_does(device):
    x = randn(3).to(device)
    x.to(device).add_(1)
    x.float().mul_(2)
    x.double().mul_(2)
    return x


@same_as_cpu
def test_concatenation_is_no_alias(device):
    x = randn(3).to(device)
    y = torch.cat([x, x])
    x.zero_()
    return y


@same_as_cpu
def test_methods_that_change_the_shape_in_place(device):
    x = randn(3, 4).to(device)
    x.t_()
    x.unsqueeze_(0)
    x.squeeze_(0)
    x.transpose_(0, 1)
    x.add_(1)
    return x


# ---------------------------------------------------------------------- operators that write


@same_as_cpu
def test_index_put_accumulates_and_assigns(device):
    x = randn(5, 4).to(device)
    i = torch.tensor([0, 2, 2]).to(device)
    x.index_put_((i,), randn(3, 4, seed=2).to(device), accumulate=True)
    x[i] = 1.5
    x[i, torch.tensor([0, 1, 2]).to(device)] = randn(3, seed=3).to(device)
    return x


@same_as_cpu
def test_a_boolean_mask_is_assigned_and_selects(device):
    x = randn(5, 4).to(device)
    x[x > 0] = 0.5
    x[torch.tensor([True, False, True, False, True]).to(device)] -= 1
    return x, x[x < 0], x.masked_select(x < -1)


@same_as_cpu
def test_a_boolean_mask_is_assigned_a_tensor(device):
    x = randn(5, 4).to(device)
    mask = x > 0
    x[mask] = x[mask] * 2
    return x


@same_as_cpu
def test_masked_fill_and_scatter(device):
    x = randn(5, 4).to(device)
    x.masked_fill_(x > 0, -1.0)
    index = torch.tensor([[0, 1], [2, 3]]).to(device)
    x[:2].scatter_(1, index, randn(2, 2, seed=1).to(device))
    x[3:].scatter_add_(1, index, randn(2, 2, seed=2).to(device))
    return x


@same_as_cpu
def test_in_place_operators_keep_the_dtype_of_their_target(device):
    x = randn(4).to(device).bfloat16()
    x.add_(randn(4, seed=3).to(device))
    x.mul_(2.5)
    i = torch.arange(4).to(device)
    i.add_(2)
    i.div_(2, rounding_mode="floor")
    return x, i


@same_as_cpu
def test_pow_and_other_in_place_functions(device):
    x = randn(3, 3).to(device)
    x.cumsum_(0)
    x.clamp_(-1, 1)
    x.pow_(2)
    x.sqrt_()
    x.lerp_(torch.ones(3, 3).to(device), 0.25)
    return x


@same_as_cpu
def test_in_place_operators_without_a_functional_form(device):
    i = torch.tensor([1, 2, 12]).to(device)
    i <<= 2
    i[1:] >>= torch.tensor([1, 3]).to(device)
    x = torch.tensor([1.5, 2.5]).to(device)
    x.polygamma_(1)
    return i, x


@same_as_cpu
def test_out_writes_its_target(device):
    out = torch.empty(3, 3).to(device)
    torch.mm(randn(3, 4).to(device), randn(4, 3).to(device), out=out)
    torch.add(out, 1, out=out)
    return out


@same_as_cpu
def test_out_grows_an_empty_target(device):
    out = torch.empty(0).to(device)
    torch.mm(randn(3, 4).to(device), randn(4, 3).to(device), out=out)
    return out


@same_as_cpu
def test_out_writes_a_window_of_a_larger_tensor(device):
    x = torch.zeros(4, 6).to(device)
    torch.mul(randn(4, 3).to(device), 2, out=x[:, 3:])
    return x


@same_as_cpu
def test_out_of_several_results(device):
    values, indices = torch.empty(3).to(device), torch.empty(3, dtype=torch.long).to(device)
    torch.max(randn(3, 5).to(device), 1, out=(values, indices))
    return values, indices


@same_as_cpu
def test_foreach_writes_every_member(device):
    a = [randn(3, seed=i).to(device) for i in range(4)]
    b = [randn(3, seed=i + 9).to(device) for i in range(4)]
    torch._foreach_add_(a, b, alpha=2.0)
    torch._foreach_mul_(a, [1.0, 2.0, 3.0, 4.0])
    torch._foreach_addcdiv_(a, b, b, 0.5)
    torch._foreach_zero_(b)
    torch._foreach_copy_(b, a)
    return a, b


@same_as_cpu
def test_foreach_writes_views_of_one_tensor(device):
    x = randn(4, 3).to(device)
    torch._foreach_add_(list(x.unbind(0)), 1.0)
    return x


@same_as_cpu
def test_foreach_goes_through_a_tensor_that_is_listed_twice_in_order(device):
    x, y = randn(3).to(device), randn(3, seed=1).to(device)
    torch._foreach_add_([x, y, x], [y, x, y], alpha=2)
    torch._foreach_mul_([x[:2], x[1:]], [2.0, 3.0])
    return x, y


@same_as_cpu
def test_foreach_takes_members_of_several_dtypes(device):
    a = [randn(3).to(device), randn(3).double().to(device)]
    torch._foreach_mul_(a, 2.0)
    return a, torch._foreach_norm(a)


@same_as_cpu
def test_a_tensor_may_be_resized_within_its_memory_and_beyond(device):
    x = randn(4).to(device)
    x.resize_(2, 2)
    y = randn(4, seed=1).to(device)
    y.resize_(6)
    y[4:] = 0
    return x, y


@same_as_cpu
def test_set_shares_the_storage_of_another_tensor(device):
    x, y = randn(4).to(device), randn(6, seed=2).to(device)
    x.set_(y)
    x.add_(1)
    return x, y


@same_as_cpu
def test_complex_numbers_are_seen_as_pairs(device):
    x = torch.view_as_complex(randn(3, 2).to(device))
    y = x * x
    torch.view_as_real(y)[0, 0] = 1
    y.imag.mul_(2)
    return torch.view_as_real(y)


# ---------------------------------------------------------------------- shapes that depend on data, CPU operands


@same_as_cpu
def test_results_whose_shape_depends_on_data(device):
    x = torch.tensor([3, 0, 1, 1]).to(device)
    return x.nonzero(), x.unique(), torch.where(x > 0)[0], torch.unique(x, return_inverse=True)


@same_as_cpu
def test_index_tensors_may_be_on_the_cpu(device):
    x = randn(5, 4).to(device)
    x[torch.tensor([0, 1])] = 2.0
    x[torch.tensor([True, False, False, True, False])] = 3.0
    return x, x[torch.tensor([3, 1])]


@same_as_cpu
def test_zero_dimensional_operands_may_be_on_the_cpu(device):
    x = randn(3).to(device)
    x.mul_(torch.tensor(1.5))
    return x * torch.tensor(2.0), x + torch.tensor(3, dtype=torch.float64), torch.tensor(2.0) - x


@same_as_cpu
def test_numbers_come_out_of_tensors(device):
    x = randn(3).to(device)
    return x.tolist(), float(x[0]), int(x[0] * 10), bool((x > -9).all()), len(x), x.numpy(force=True).sum()


@same_as_cpu
def test_sorting_and_top_k(device):
    x = randn(3, 6).to(device)
    return *x.topk(2), *x.sort(), x.argmax(-1)
