"""Graph networks by index_add and scatter: GCN with a dense adjacency, GAT by scatter softmax, masked node losses."""

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)
device = torch.device("cuda")
N, E = 40, 160
edge_index = torch.randint(0, N, (2, E)).to(device)
x = torch.randn(N, 16).to(device)
y = torch.randint(0, 4, (N,)).to(device)
train_mask = (torch.arange(N) < 28).to(device)


def scatter_softmax(src, index, n):
    top = torch.full((n,), float("-inf"), device=src.device).scatter_reduce(0, index, src, "amax", include_self=True)
    e = (src - top[index]).exp()
    total = torch.zeros(n, device=src.device).scatter_add_(0, index, e)
    return e / (total[index] + 1e-16)


class GAT(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin1, self.att = nn.Linear(16, 24), nn.Linear(48, 1)
        self.lin2 = nn.Linear(24, 4)

    def forward(self, x, edge_index):
        src, dst = edge_index
        h = self.lin1(x)
        a = F.leaky_relu(self.att(torch.cat([h[src], h[dst]], dim=-1))).squeeze(-1)
        alpha = scatter_softmax(a, dst, x.size(0))
        out = torch.zeros_like(h).index_add_(0, dst, alpha.unsqueeze(-1) * h[src])
        h = F.elu(out + h)
        deg = torch.zeros(x.size(0), device=x.device).index_add(0, dst, torch.ones(dst.size(0), device=x.device))
        agg = torch.zeros_like(h).scatter_add(0, dst.unsqueeze(-1).expand(-1, h.size(1)), h[src])
        return F.log_softmax(self.lin2(agg / deg.clamp(min=1).unsqueeze(-1) + h), dim=-1)


model = GAT().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
for epoch in range(5):
    model.train()
    optimizer.zero_grad()
    out = model(x, edge_index)
    loss = F.nll_loss(out[train_mask], y[train_mask])
    loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        pred = model(x, edge_index).argmax(dim=1)
        acc = int((pred[~train_mask] == y[~train_mask]).sum()) / int((~train_mask).sum())
    print(f"Epoch: {epoch:03d}, Loss: {loss:.6f}, Val: {acc:.4f}")

# Dense adjacency of the classic GCN, and a sparse product.
adj = torch.zeros(N, N, device=device)
adj[edge_index[0], edge_index[1]] = 1
adj = adj + torch.eye(N, device=device)
norm = adj.sum(1).pow(-0.5)
adj = norm[:, None] * adj * norm[None, :]
w = nn.Parameter(torch.randn(16, 4).to(device) * 0.1)
opt = torch.optim.SGD([w], lr=0.5)
for _ in range(3):
    loss = F.cross_entropy((adj @ (x @ w))[train_mask], y[train_mask])
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"gcn {loss.item():.6f}")
