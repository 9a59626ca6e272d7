"""What scripts do around training: hooks, custom autograd, checkpointing, weight_norm, EMA, freezing, param groups."""

import copy
import logging

import torch
import torch.nn as nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

logging.basicConfig(level=logging.INFO)
torch.manual_seed(0)
device = "cuda"


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, beta):
        sig = torch.sigmoid(beta * x)
        ctx.save_for_backward(x, sig)
        ctx.beta = beta
        return x * sig

    @staticmethod
    def backward(ctx, grad):
        x, sig = ctx.saved_tensors
        return grad * (sig + ctx.beta * x * sig * (1 - sig)), None


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).float()

    @staticmethod
    def backward(ctx, grad):
        return torch.nn.functional.hardtanh(grad)


class GradReverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.scale * grad, None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = weight_norm(nn.Linear(12, 32))
        self.mid = nn.ModuleList([nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()) for _ in range(3)])
        self.sn = spectral_norm(nn.Linear(32, 32))
        self.out = nn.Linear(32, 4)
        self.domain = nn.Linear(32, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.steps += 1
        x = Swish.apply(self.inp(x), 1.5)
        for layer in self.mid:
            x = checkpoint(layer, x, use_reentrant=False)
        x = x + 0.1 * StraightThrough.apply(self.sn(x))
        return self.out(x), self.domain(GradReverse.apply(x, 0.5))


class EMA:
    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model):
        for n, p in model.named_parameters():
            self.shadow[n].mul_(self.decay).add_(p, alpha=1 - self.decay)


def clamp_gradient(p):
    p.grad.clamp_(-0.1, 0.1)


model = Net().to(device)
start = copy.deepcopy(model)
ema = EMA(model, 0.9)
seen = {}
model.mid[1].register_forward_hook(lambda m, i, o: seen.__setitem__("act", o.detach().abs().mean()))
model.mid[0].register_forward_pre_hook(lambda m, i: (i[0] * 1.01,))
model.out.register_full_backward_hook(lambda m, gi, go: seen.__setitem__("go", go[0].norm()))
model.out.weight.register_hook(lambda g: g * 0.5)
model.out.bias.register_post_accumulate_grad_hook(clamp_gradient)
for p in model.mid[2].parameters():
    p.requires_grad_(False)
optimizer = torch.optim.Adam(
    [{"params": [p for n, p in model.named_parameters() if n.startswith("inp")], "lr": 1e-3}], lr=1e-2
)
optimizer.add_param_group(
    {"params": [p for n, p in model.named_parameters() if not n.startswith(("inp", "mid.2"))], "weight_decay": 0.1}
)
data = torch.randn(60, 12)
labels = torch.randint(0, 4, (60,))
print(model)
for step in range(6):
    x, y = data[step * 10 : step * 10 + 10].to(device), labels[step * 10 : step * 10 + 10].to(device)
    if step == 3:
        for p in model.mid[2].parameters():
            p.requires_grad = True
        optimizer.add_param_group({"params": list(model.mid[2].parameters()), "lr": 1e-3})
    x.requires_grad_(True)
    out, domain = model(x)
    (gx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    penalty = ((gx.norm(2, dim=1) - 1) ** 2).mean()
    loss = nn.functional.cross_entropy(out, y) + domain.pow(2).mean() + 0.1 * penalty
    optimizer.zero_grad()
    loss.backward()
    grads = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    ema.update(model)
    if torch.isnan(loss):
        raise ValueError("nan")
    print(f"{step} loss {loss.item():.6f} grads {grads:.6f} act {seen['act'].item():.6f} go {float(seen['go']):.6f}")
vector = parameters_to_vector(model.parameters())
print(f"vector {vector.norm().item():.6f} steps {int(model.steps)}")
vector_to_parameters(vector * 0.5, start.parameters())
print(f"half {parameters_to_vector(start.parameters()).norm().item():.6f}")
print(f"ema {sum(v.abs().sum() for v in ema.shadow.values()).item():.6f}")
seq = nn.Sequential(*[nn.Linear(12, 12) for _ in range(4)]).to(device)
out = checkpoint_sequential(seq, 2, data[:8].to(device).requires_grad_(), use_reentrant=True)
out.sum().backward()
print(f"sequential {seq[0].weight.grad.abs().sum().item():.6f}")
print(model.out.weight.data[0, :4])
print(model.out.bias)
print(vector[:3].tolist(), vector[0].item(), f"{vector[1]:.4f}", vector.shape, vector.dtype, vector.is_cuda)
print(model.out.weight.detach().cpu().numpy().mean().round(6))
