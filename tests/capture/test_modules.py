"""Modules, optimizers and autograd do on the accelerator what they do on the CPU, step after step."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn

from moai.graph.step_graph import Scalar
from tests.capture.compare import randn, same_as_cpu

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
def test_integers_are_counted_as_a_gpu_counts_them(device):
    x = (randn(50) * 10).int().to(device)
    of_cpu = x.float() if device == "cpu" else x  # which counts floats only
    return [torch.histc(of_cpu, bins, -10, 12).int() for bins in (5, 11, 22, 40)]


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


@same_as_cpu
def test_bags_of_embeddings_of_equal_and_of_uneven_sizes(device):
    found = []
    for mode in ("sum", "mean", "max"):
        torch.manual_seed(0)
        model = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=2).to(device)
        rows = torch.tensor([[1, 2, 8], [2, 2, 2], [3, 0, 3]]).to(device)
        bags = model(rows), model(rows.flatten(), torch.tensor([0, 2, 2, 7]).to(device))
        sum(b.pow(2).sum() for b in bags).backward()
        found += [*bags, model.weight.grad]
    return found


@same_as_cpu
def test_weighted_bags_of_embeddings(device):
    model = nn.EmbeddingBag(9, 4, mode="sum").to(device)
    weights = randn(2, 3).to(device).requires_grad_()
    y = model(torch.tensor([[1, 2, 8], [3, 0, 3]]).to(device), per_sample_weights=weights)
    y.pow(2).sum().backward()
    return y, weights.grad, model.weight.grad


@same_as_cpu
def test_spectra(device):
    x = randn(2, 3, 8).to(device).requires_grad_()
    window = torch.hann_window(8, device=device)
    spectrum = torch.fft.rfft(x * window)
    y = torch.fft.irfft(spectrum * spectrum.abs()) + torch.fft.fftshift(torch.fft.fft2(x)).real
    spectrogram = torch.stft(x[:, 0], 4, 2, window=window[:4], return_complex=True)
    (y.pow(2).sum() + spectrogram.abs().pow(2).sum() + spectrum.imag.sum()).backward()
    return y, spectrogram.abs(), x.grad


@same_as_cpu
def test_conjugated_and_negated_views(device):
    x = torch.complex(randn(3, 3), randn(3, 3, seed=1)).to(device)
    y = x.conj()
    z, w = torch.zeros_like(x), torch.zeros(3, 3, device=device)
    z.conj().copy_(x)
    z[0] = y[1]
    w.copy_(y.imag)
    y.imag[0].neg_()
    found = (
        y @ x,
        y.clone(),
        y.imag + 1,
        y.cpu(),
        y.imag.cpu(),
        z,
        w,
        torch.addmm(y, y, y.mT),
        y.reshape(-1)[3].item(),
    )
    return [
        torch.view_as_real(f.resolve_conj()) if isinstance(f, torch.Tensor) and f.is_complex() else f for f in found
    ]


@same_as_cpu
def test_packed_sequences(device):
    model = nn.LSTM(3, 4, batch_first=True).to(device)
    x = randn(3, 5, 3).to(device).requires_grad_()
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 5, 3]), batch_first=True, enforce_sorted=False)
    y, lengths = nn.utils.rnn.pad_packed_sequence(model(packed)[0], batch_first=True, padding_value=-1.0)
    y.pow(2).sum().backward()
    return y, lengths, x.grad, model.weight_hh_l0.grad


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


def test_what_an_optimizers_closure_computes_is_a_forward_with_fixed_numbers(capture):
    """Numbers that vary would hide from the devices what batch norm's eps is."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).cuda()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(randn(6, 3).cuda()).pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure).item()
    norms = [node for graph in capture.graphs for node in graph.nodes if "batch_norm" in str(node.op)]
    assert norms and not any(isinstance(arg, Scalar) for node in norms for arg in node.args)


def test_a_call_of_nothing_but_numbers_in_an_optimizers_step(capture):
    weight = nn.Parameter(randn(3).cuda())

    class Halves(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self):
            weight.mul_(torch.scalar_tensor(0.5, device="cuda"))

    before = weight.detach().cpu()
    Halves([weight], {}).step()
    assert torch.equal(weight.detach().cpu(), before / 2)


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
