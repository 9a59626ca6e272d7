"""Every optimizer of torch.optim that people use, on one small regression; LBFGS with its closure, Adafactor, SWA."""

import torch
from torch import nn, optim
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

device = torch.device("cuda")
makers = {
    "SGD": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-2, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=1e-1, lr_decay=0.01),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: optim.Adamax(p, lr=1e-2),
    "NAdam": lambda p: optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: optim.RAdam(p, lr=1e-2, weight_decay=0.01),
    "Rprop": lambda p: optim.Rprop(p, lr=1e-2),
    "ASGD": lambda p: optim.ASGD(p, lr=1e-2),
    "Adafactor": lambda p: optim.Adafactor(p, lr=1e-2),
    "AdamW foreach=False": lambda p: optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW capturable": lambda p: optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "Adam fused": lambda p: optim.Adam(p, lr=1e-2, amsgrad=True, fused=True),
}
x = torch.linspace(-1, 1, 48).reshape(24, 2)
y = torch.sin(3 * x.sum(1, keepdim=True))
for name, make in makers.items():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)
    optimizer = make(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
    print(f"{name}: {loss.item():.6f}")

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).to(device)
optimizer = optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, history_size=5, line_search_fn="strong_wolfe")


def closure():
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x.to(device)), y.to(device))
    loss.backward()
    return loss


for _ in range(2):
    print(f"LBFGS: {optimizer.step(closure).item():.6f}")

optimizer = optim.SGD(model.parameters(), lr=0.01)
swa_model = AveragedModel(model)
ema_model = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
swa_scheduler = SWALR(optimizer, swa_lr=0.05)
for _ in range(4):
    closure()
    optimizer.step()
    swa_model.update_parameters(model)
    ema_model.update_parameters(model)
    swa_scheduler.step()
loader = torch.utils.data.DataLoader(x, batch_size=8)
update_bn(loader, swa_model, device=device)
with torch.no_grad():
    print(f"SWA: {nn.functional.mse_loss(swa_model(x.to(device)), y.to(device)).item():.6f}")
    print(f"EMA: {nn.functional.mse_loss(ema_model(x.to(device)), y.to(device)).item():.6f}")
