"""torch.func: per-sample gradients by vmap, jacobians, functional_call, meta-learning (MAML) with create_graph."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, grad, grad_and_value, jacrev, stack_module_state, vmap

torch.manual_seed(0)
device = "cuda"
model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).to(device)
params = {k: v.detach() for k, v in model.named_parameters()}
x, y = torch.randn(12, 6).to(device), torch.randint(0, 3, (12,)).to(device)


def compute_loss(params, sample, target):
    prediction = functional_call(model, params, (sample.unsqueeze(0),))
    return F.cross_entropy(prediction, target.unsqueeze(0))


per_sample = vmap(grad(compute_loss), in_dims=(None, 0, 0))(params, x, y)
norms = torch.stack([g.flatten(1).norm(dim=1) for g in per_sample.values()]).norm(dim=0)
print([round(v, 5) for v in norms.tolist()])
for step in range(4):
    grads, loss = grad_and_value(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))(params)
    params = {k: p - 0.1 * grads[k] for k, p in params.items()}
    print(f"{step} {loss.item():.6f}")
jac = jacrev(lambda s: functional_call(model, params, (s,)))(x[0])
print(f"jac {jac.abs().sum().item():.6f} {tuple(jac.shape)}")
models = [nn.Linear(6, 3).to(device) for _ in range(3)]
stacked, buffers = stack_module_state(models)
out = vmap(lambda p, b, s: functional_call(models[0], (p, b), (s,)), in_dims=(0, 0, None))(stacked, buffers, x)
print(f"ensemble {out.abs().sum().item():.6f}")

meta = nn.Linear(6, 3).to(device)
optimizer = torch.optim.Adam(meta.parameters(), lr=1e-2)
for step in range(3):
    outer = 0.0
    for task in range(2):
        fast = dict(meta.named_parameters())
        for _ in range(2):
            inner = F.cross_entropy(functional_call(meta, fast, (x[task::2],)), y[task::2])
            g = torch.autograd.grad(inner, fast.values(), create_graph=True)
            fast = {k: p - 0.4 * gi for (k, p), gi in zip(fast.items(), g, strict=True)}
        outer = outer + F.cross_entropy(functional_call(meta, fast, (x,)), y)
    optimizer.zero_grad()
    outer.backward()
    optimizer.step()
    print(f"maml {step} {outer.item():.6f}")
