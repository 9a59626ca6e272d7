"""Shapes that depend on data: boolean masks, nonzero, unique, variable lengths, packed sequences, masked losses."""

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

torch.manual_seed(0)
device = torch.device("cuda")


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        self.gru = nn.GRU(16, 12, batch_first=True, bidirectional=True)
        self.out = nn.Linear(24, 5)

    def forward(self, tokens, lengths):
        packed = pack_padded_sequence(self.embed(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, _ = self.gru(packed)
        output, _ = pad_packed_sequence(output, batch_first=True, total_length=tokens.size(1))
        return self.out(output)


model = Tagger().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for step in range(4):
    lengths = torch.randint(3, 9, (6,))
    tokens = pad_sequence([torch.randint(1, 50, (int(n),)) for n in lengths], batch_first=True).to(device)
    tags = (tokens % 5).to(device)
    mask = tokens != 0
    logits = model(tokens, lengths)
    active = logits[mask]
    loss = nn.functional.cross_entropy(active, tags[mask])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    correct = (logits.argmax(-1) == tags)[mask].float().mean()
    print(f"{step} n {mask.sum().item()} loss {loss.item():.6f} acc {correct.item():.4f}")

x = torch.arange(24.0, device=device).reshape(4, 6)
print(torch.nonzero(x > 20).tolist(), (x % 5 == 0).nonzero(as_tuple=True)[1].tolist())
values, counts = torch.unique((x % 4).long(), return_counts=True)
print(values, counts.cpu())
w = torch.randn(4, 6).to(device).requires_grad_()
hard = (w.sigmoid() > 0.5).sum(1)
for row in range(w.size(0)):
    if hard[row] > 2:
        w.data[row] *= 0.5
picked = torch.masked_select(w, w > 0)
picked.square().sum().backward()
print(f"picked {picked.numel()} grad {w.grad.sum().item():.6f}")
idx = torch.where(w[:, 0] > -10)[0]
w2 = w.detach().clone()
w2[idx] = 1.0
w2[:, 1:3][w2[:, 1:3] == 1] = 2.0
print(w2.sum().item(), torch.bincount(torch.tensor([1, 1, 3]).to(device)).tolist())
print(torch.repeat_interleave(torch.arange(3).to(device), torch.tensor([1, 2, 3]).to(device)))
hard_k = (w.detach().flatten().abs() > 0.7).nonzero().squeeze(1)
losses = (w * 2).flatten()[hard_k]
print(f"mined {losses.mean().item():.6f} of {len(losses)}")
if (w > 100).any():
    print("large")
while w.detach().norm() > 1:
    w.data.mul_(0.9)
print(f"{w.norm().item():.6f}")
