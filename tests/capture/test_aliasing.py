"""Views, writes and shared storages: what a script does to memory comes out as on one device."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn

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


# ---------------------------------------------------------------------- modules


def two_layers(device, *, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(device)


@same_as_cpu
def test_tied_weights_stay_tied_and_gather_both_gradients(device):
    embed, head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
    head.weight = embed.weight
    model = nn.ModuleList([embed, head]).to(device)
    assert model[0].weight is model[1].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model[1](model[0](torch.tensor([1, 2]).to(device))).pow(2).sum().backward()
        optimizer.step()
    return model[0].weight, model[1].weight.grad


@same_as_cpu
def test_data_is_exchanged(device):
    p = nn.Parameter(randn(3).to(device))
    p.data = randn(3, seed=5).to(device)
    p.data.add_(1)
    q = nn.Parameter(randn(3).to(device))
    q.data = randn(4, 2, seed=5).to(device)
    (q * 2).sum().backward()
    return p, q, q.grad


@same_as_cpu
def test_gradients_accumulate_over_backwards(device):
    p = nn.Parameter(randn(3, 3).to(device))
    for i in range(3):
        (randn(2, 3, seed=i).to(device) @ p).pow(2).sum().backward()
    return p.grad


@same_as_cpu
def test_gradients_accumulate_across_reads(device):
    p = nn.Parameter(randn(3, 3).to(device))
    losses = []
    for i in range(3):
        loss = (randn(2, 3, seed=i).to(device) @ p).pow(2).sum()
        loss.backward()
        losses.append(loss.item())
    return p.grad, losses


@same_as_cpu
def test_a_detached_view_kept_across_steps_follows_the_parameter(device):
    model = two_layers(device)
    seen = model[0].weight.detach()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    for i in range(3):
        optimizer.zero_grad()
        model(randn(2, 3, seed=i).to(device)).sum().backward()
        optimizer.step()
        history.append(seen.sum().item())
    return history


@same_as_cpu
def test_an_optimizer_built_before_the_move_trains_the_moved_parameters(device):
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.to(device)
    model(randn(2, 3).to(device)).sum().backward()
    optimizer.step()
    return model.weight


@same_as_cpu
def test_a_deep_copy_is_a_model_of_its_own(device):
    model = two_layers(device)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.mul_(2)
    return model[0].weight, twin[0].weight


@same_as_cpu
def test_swapped_tensors_exchange_their_values(device):
    a, b = randn(3).to(device), randn(2, 2, seed=1).to(device)
    torch.utils.swap_tensors(a, b)
    a.add_(1)
    return a, b


@same_as_cpu
def test_weights_are_written_under_no_grad(device):
    model = two_layers(device)
    with torch.no_grad():
        model[0].weight.copy_(randn(4, 3))
        model[0].bias[1:] = 2
        model[0].bias[0].fill_(7)
    return model[0].weight, model[0].bias


@same_as_cpu
def test_a_moving_average_of_the_weights(device):
    weight = randn(3).to(device)
    average = weight.clone()
    for _ in range(3):
        weight.add_(1)
        average.lerp_(weight, 0.1)
        average.sum().item()
    return average, weight


@same_as_cpu
def test_batch_norm_updates_its_running_statistics(device):
    model = nn.BatchNorm1d(3).to(device)
    for i in range(3):
        y = model(randn(5, 3, seed=i).to(device) * 3 + 1)
    y.sum().backward()
    model.eval()
    return y, model.running_mean, model.running_var, model.num_batches_tracked, model(randn(5, 3).to(device))


@same_as_cpu
def test_layer_and_group_norm(device):
    x = randn(2, 4, 6).to(device).requires_grad_()
    layer, group = nn.LayerNorm(6).to(device), nn.GroupNorm(2, 4).to(device)
    (layer(x).pow(2).sum() + group(x).pow(3).sum()).backward()
    return x.grad, layer.weight.grad, group.weight.grad


@same_as_cpu
def test_convolution_and_pooling(device):
    model = nn.Conv2d(2, 3, 3, padding=1).to(device)
    y = nn.functional.max_pool2d(model(randn(1, 2, 6, 6).to(device)).relu(), 2)
    y.sum().backward()
    return y, model.weight.grad


@same_as_cpu
def test_lstm(device):
    model = nn.LSTM(3, 4, num_layers=2, batch_first=True).to(device)
    y, (h, c) = model(randn(2, 5, 3).to(device))
    (y.sum() + h.sum() + c.sum()).backward()
    return y, model.weight_hh_l0.grad, model.bias_ih_l1.grad


@same_as_cpu
def test_gru(device):
    model = nn.GRU(3, 4, bidirectional=True).to(device)
    y, h = model(randn(5, 2, 3).to(device))
    (y.sum() + h.sum()).backward()
    return y, model.weight_ih_l0.grad


# ---------------------------------------------------------------------- optimizers


def train(device, make_optimizer, steps=3):
    model = two_layers(device)
    optimizer = make_optimizer(model.parameters())
    for i in range(steps):
        optimizer.zero_grad()
        model(randn(2, 3, seed=i).to(device)).pow(2).sum().backward()
        optimizer.step()
    return list(model.parameters())


@same_as_cpu
def test_sgd_with_nesterov_momentum(device):
    return train(device, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True))


@same_as_cpu
def test_amsgrad(device):
    return train(device, lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True))


@same_as_cpu
def test_rmsprop(device):
    return train(device, lambda p: torch.optim.RMSprop(p, lr=0.1))


@same_as_cpu
def test_adagrad(device):
    return train(device, lambda p: torch.optim.Adagrad(p, lr=0.1))


@same_as_cpu
def test_a_learning_rate_that_is_a_tensor(device):
    return train(device, lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False))


@same_as_cpu
def test_lbfgs(device):
    model = nn.Linear(3, 1).to(device)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    x, y = randn(6, 3).to(device), randn(6, 1, seed=1).to(device)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.weight


@same_as_cpu
def test_gradients_are_clipped_by_norm_and_by_value(device):
    model = nn.Linear(3, 3).to(device)
    (model(randn(2, 3).to(device)) * 100).pow(2).sum().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    nn.utils.clip_grad_value_(model.parameters(), 0.2)
    return norm, model.weight.grad, model.bias.grad


@same_as_cpu
def test_grad_scaler_scales_and_skips_infinite_steps(device):
    model = two_layers(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(randn(2, 3).to(device)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    return model[0].weight, scaler.get_scale()


# ---------------------------------------------------------------------- autograd


@same_as_cpu
def test_gradients_of_gradients(device):
    p = nn.Parameter(randn(3).to(device))
    (g,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    g.pow(2).sum().backward()
    return p.grad


@same_as_cpu
def test_a_graph_is_used_twice(device):
    p = nn.Parameter(randn(3).to(device))
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return p.grad


@same_as_cpu
def test_in_place_operators_are_differentiated(device):
    p = nn.Parameter(randn(4, 4).to(device))
    y = p * 2
    y[1] = 0
    y[:, 0].mul_(3)
    y.relu_()
    y.sum().backward()
    return p.grad, y


@same_as_cpu
def test_a_saved_tensor_that_was_overwritten_is_an_error(device):
    p = nn.Parameter(randn(3).to(device))
    y = p.exp()
    y.add_(1)
    try:
        y.sum().backward()
    except RuntimeError as error:
        return "modified by an inplace" in str(error)
    return False


class _ReluWithMaskedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad = grad.clone()
        grad[x < 0] = 0
        return grad


@same_as_cpu
def test_a_custom_autograd_function(device):
    p = nn.Parameter(randn(5).to(device))
    _ReluWithMaskedGradient.apply(p).sum().backward()
    return p.grad


@same_as_cpu
def test_gradient_hooks(device):
    p = nn.Parameter(randn(3).to(device))
    p.register_hook(lambda g: g * 2)
    seen = []
    p.register_post_accumulate_grad_hook(lambda q: seen.append(q.grad.clone()))
    (p * 3).sum().backward()
    return p.grad, seen


@same_as_cpu
def test_reads_between_forward_and_backward(device):
    p = nn.Parameter(randn(3).to(device))
    y = p * 2
    first = y.sum().item()
    z = (y * y).sum()
    second = z.item()
    z.backward()
    return p.grad, first, second


@same_as_cpu
def test_function_transforms(device):
    x = randn(3, 4).to(device)
    grad = torch.func.grad(lambda x: (x**2).sum())(x)
    rows = torch.func.vmap(lambda a, b: (a * b).sum())(x, randn(3, 4, seed=2).to(device))
    jacobian = torch.func.jacrev(lambda x: x.sin())(x[0])
    return grad, rows, jacobian


@same_as_cpu
def test_functional_call(device):
    model = two_layers(device)
    weights = {name: p.detach() * 2 for name, p in model.named_parameters()}
    return torch.func.functional_call(model, weights, (randn(2, 3).to(device),))


@same_as_cpu
def test_attention_with_and_without_a_mask(device):
    q, k, v = (nn.Parameter(randn(2, 2, 4, 8, seed=i).to(device)) for i in range(3))
    causal = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = (randn(4, 4, seed=9) > -0.5).to(device)
    masked = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    (causal.sum() + masked.pow(2).sum()).backward()
    return causal, masked, q.grad, k.grad, v.grad


@same_as_cpu
def test_attention_with_fewer_key_heads(device):
    q = nn.Parameter(randn(2, 4, 5, 8).to(device))
    k, v = (nn.Parameter(randn(2, 2, 5, 8, seed=i).to(device)) for i in (1, 2))
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    y.pow(2).sum().backward()
    return y, q.grad, k.grad, v.grad


@same_as_cpu
def test_attention_with_a_mask_that_is_trained(device):
    q, k, v = (randn(1, 2, 4, 8, seed=i).to(device) for i in range(3))
    bias = nn.Parameter(randn(4, 4, seed=9).to(device))
    y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    y.pow(2).sum().backward()
    return y, bias.grad


@same_as_cpu
def test_checkpointed_layers_give_the_same_gradients(device):
    grads = []
    for use_reentrant in (True, False):
        model = two_layers(device)
        x = randn(2, 3).to(device).requires_grad_()
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant).pow(2).sum().backward()
        grads += [x.grad, model[0].weight.grad]
    return grads
