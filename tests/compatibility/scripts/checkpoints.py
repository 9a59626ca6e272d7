"""Trains, saves model, optimizer, scheduler and random states, and goes on exactly from a file: `--resume` continues."""

import argparse
import os

import torch
import torch.nn as nn

parser = argparse.ArgumentParser()
parser.add_argument("--resume", default="")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--device", default="cuda")
args = parser.parse_args()
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 40)).to(args.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
start = 0
if args.resume and os.path.exists(args.resume):
    state = torch.load(args.resume, map_location=args.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"].cpu())
    start = state["step"]
for step in range(start, args.steps):
    tokens = torch.randint(0, 40, (10, 8)).to(args.device)
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    print(f"{step} {loss.item():.6f}")
    if step == 2:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "step": step + 1,
        }
        torch.save(state, "checkpoint.pt")
