"""Contrastive training in the style of CLIP: two towers, logit scale, symmetric loss, EmbeddingBag, triplet, InfoNCE."""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"


class CLIP(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.AdaptiveAvgPool2d(2))
        self.image_proj = nn.Linear(32, 16, bias=False)
        self.text = nn.EmbeddingBag(100, 24, mode="mean")
        self.text_proj = nn.Linear(24, 16, bias=False)
        self.logit_scale = nn.Parameter(torch.ones([]) * np.log(1 / 0.07))

    def forward(self, image, text):
        i = F.normalize(self.image_proj(self.image(image).flatten(1)), dim=-1)
        t = self.text_proj(self.text(text))
        t = t / t.norm(dim=-1, keepdim=True)
        logits = self.logit_scale.exp() * i @ t.t()
        return logits, logits.t(), i, t


model = CLIP().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
images, texts = torch.randn(48, 3, 12, 12), torch.randint(0, 100, (48, 7))
for step in range(5):
    image, text = images[step * 8 : step * 8 + 12].to(device), texts[step * 8 : step * 8 + 12].to(device)
    logits_i, logits_t, i, t = model(image, text)
    labels = torch.arange(len(logits_i), device=device)
    loss = (F.cross_entropy(logits_i, labels) + F.cross_entropy(logits_t, labels)) / 2
    loss = loss + 0.1 * F.triplet_margin_loss(i, t, t.roll(1, 0)) + 0.1 * F.cosine_embedding_loss(i, t, labels * 0 + 1)
    loss = (
        loss
        + 0.01 * torch.cdist(i, t).mean()
        + 0.01 * F.kl_div(F.log_softmax(logits_i, 1), F.softmax(logits_t, 1), reduction="batchmean")
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, np.log(100))
        acc = (logits_i.argmax(1) == labels).float().mean()
    print(f"step {step} loss {loss.item():.6f} acc {acc.item():.4f} scale {model.logit_scale.item():.6f}")
