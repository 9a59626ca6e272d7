"""An accelerate loop: prepare, accumulate, clip, gather_for_metrics, save_state and load_state, unwrap_model."""

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset


def main():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(7)
    x = torch.randn(64, 10)
    dataset = TensorDataset(x, (x.sum(1) > 0).long())
    loader = DataLoader(dataset, batch_size=8, shuffle=True)
    eval_loader = DataLoader(dataset, batch_size=24)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
    model, optimizer, loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, loader, eval_loader, scheduler
    )
    accelerator.print(f"processes {accelerator.num_processes}")
    for epoch in range(2):
        model.train()
        for batch, target in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(batch), target)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    accelerator.print(f"loss {loss.item():.6f} norm {norm.item():.6f}")
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        model.eval()
        hits, n = 0, 0
        for batch, target in eval_loader:
            with torch.no_grad():
                pred = model(batch).argmax(-1)
            pred, target = accelerator.gather_for_metrics((pred, target))
            hits += (pred == target).sum().item()
            n += len(target)
        accelerator.print(f"epoch {epoch} accuracy {hits}/{n}")
        if epoch == 0:
            accelerator.save_state("accelerate_state")
    accelerator.wait_for_everyone()
    unwrapped = accelerator.unwrap_model(model)
    accelerator.print(f"weights {sum(p.double().abs().sum().item() for p in unwrapped.parameters()):.5f}")
    accelerator.load_state("accelerate_state")
    accelerator.print(f"epoch 0 {sum(p.double().abs().sum().item() for p in unwrapped.parameters()):.5f}")
    accelerator.save(unwrapped.state_dict(), "accelerate.pt")


if __name__ == "__main__":
    main()
