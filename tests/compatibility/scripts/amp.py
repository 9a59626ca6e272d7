"""Mixed precision as in the recipe: autocast in fp16 and bf16, GradScaler, gradient penalty, logger of scalars, lr finder."""

import csv
import time
from collections import defaultdict

import torch
import torch.nn as nn

torch.manual_seed(0)
device = "cuda"


class SummaryWriter:
    def __init__(self):
        self.rows = defaultdict(list)

    def add_scalar(self, tag, value, step):
        self.rows[tag].append((step, float(value)))

    def add_histogram(self, tag, values, step):
        self.rows[tag].append((step, float(values.detach().cpu().float().std())))

    def close(self, path):
        with open(path, "w") as f:
            csv.writer(f).writerows((t, *r) for t, rows in self.rows.items() for r in rows)


writer = SummaryWriter()
x, y = torch.randn(64, 16), torch.randn(64, 4)


def make():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 4)).to(device)


for dtype in (torch.float16, torch.bfloat16):
    net = make()
    opt = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.time()
    for step in range(5):
        inp, target = x[step * 8 : step * 8 + 16].to(device), y[step * 8 : step * 8 + 16].to(device)
        with torch.autocast(device_type=device, dtype=dtype):
            output = net(inp)
            assert output.dtype is dtype
            loss = nn.functional.mse_loss(output.float(), target)
            assert loss.dtype is torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm=0.5)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        writer.add_scalar("loss", loss, step)
        writer.add_scalar("norm", norm, step)
        writer.add_histogram("w", net[0].weight, step)
        print(f"{dtype} {step} loss {loss.item():.3f} scale {scaler.get_scale() > 1}")
    torch.cuda.synchronize()
    print("max memory", torch.cuda.max_memory_allocated() >= 0, time.time() > start)
    torch.save({"net": net.state_dict(), "opt": opt.state_dict(), "scaler": scaler.state_dict()}, "amp.pt")
    scaler.load_state_dict(torch.load("amp.pt")["scaler"])
writer.close("scalars.csv")

# The learning rate range test of fast.ai, with a restart from the saved state.
net = make()
opt = torch.optim.Adam(net.parameters(), lr=1e-5)
state = {k: v.clone() for k, v in net.state_dict().items()}
lrs, losses, best = [], [], float("inf")
for i in range(8):
    lr = 1e-5 * (10 / 1e-5) ** (i / 7)
    for g in opt.param_groups:
        g["lr"] = lr
    loss = nn.functional.mse_loss(net(x.to(device)), y.to(device))
    opt.zero_grad()
    loss.backward()
    opt.step()
    value = loss.item()
    if value > 4 * best:
        break
    best = min(best, value)
    lrs.append(lr)
    losses.append(value)
print([f"{v:.5f}" for v in losses])
net.load_state_dict(state)
with torch.no_grad():
    print(f"restored {nn.functional.mse_loss(net(x.to(device)), y.to(device)).item():.6f}")
