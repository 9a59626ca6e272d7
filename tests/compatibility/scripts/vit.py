"""A vision transformer in the style of vit-pytorch: patches by conv, class token, mixup, cosine schedule with warm-up."""

import math

import torch
from torch import nn


class ViT(nn.Module):
    def __init__(self, image_size=16, patch=4, dim=32, depth=2, heads=4, classes=10):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        n = (image_size // patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, n + 1, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, heads, dim * 4, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.encoder(x))[:, 0])


torch.manual_seed(42)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
model = ViT().to(device)
decay = [p for p in model.parameters() if p.dim() > 1]
no_decay = [p for p in model.parameters() if p.dim() <= 1]
groups = [{"params": decay, "weight_decay": 0.05}, {"params": no_decay, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
warmup, total = 2, 8
schedule = lambda s: (s + 1) / warmup if s < warmup else 0.5 * (1 + math.cos(math.pi * (s - warmup) / (total - warmup)))  # noqa: E731
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
x, y = torch.randn(64, 3, 16, 16), torch.randint(0, 10, (64,))
for step in range(total):
    idx = torch.arange(step * 8, step * 8 + 16) % 64
    images, targets = x[idx].to(device), y[idx].to(device)
    lam = 0.3
    mixed = lam * images + (1 - lam) * images.flip(0)
    logits = model(mixed)
    loss = lam * nn.functional.cross_entropy(logits, targets) + (1 - lam) * nn.functional.cross_entropy(
        logits, targets.flip(0)
    )
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    print(f"{step} loss={loss.item():.6f} norm={norm.item():.6f} lr={scheduler.get_last_lr()[0]:.8f}")
    del images, targets
torch.cuda.empty_cache()
print("peak", torch.cuda.max_memory_allocated() >= 0)
