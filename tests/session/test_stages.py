"""A script whose plan has stages: all that scripts do beside plain steps gives the numbers of plain PyTorch."""

from __future__ import annotations

import pytest

from tests.session.test_scripts import assert_fails_clearly, run

SCRIPT = """
import torch.nn as nn, torch.nn.functional as F
torch.set_default_dtype(torch.float64)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.blocks = nn.Embedding(29, 16), nn.ModuleList(Block() for _ in range(4))
    def forward(self, x):
        h = self.table(x)
        for block in self.blocks:
            h = block(h)
        return F.linear(h, self.table.weight)

def numbers(device):
    torch.manual_seed(0)
    model = Tied().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    generator = torch.Generator().manual_seed(1)
    found = []
    def loss(n):
        x, y = (torch.randint(0, 29, (n, 7), generator=generator) for _ in range(2))
        y[0] = -100
        return F.cross_entropy(model(x.to(device)).flatten(0, 1), y.to(device).flatten())
    def step(n, times=1):
        optimizer.zero_grad()
        for _ in range(times):
            last = loss(n) / times
            last.backward()
        found.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        found.append(last.item())
    step(8)
    step(8)
    with torch.no_grad():                       # evaluation
        found.append(loss(8).item())
        found.append(loss(3).item())
    step(5)                                     # a last batch of another size, and a smaller one than micro-batches
    step(2)
    step(4, times=2)                            # gradients that the script adds up
    optimizer.zero_grad()
    for _ in range(2):                          # and with a look at the losses in between
        last = loss(4)
        found.append(last.item())
        last.backward()
    found.append(model.blocks[3].up.weight.grad.norm().item())
    optimizer.step()
    model.load_state_dict({name: x.cpu().clone() for name, x in model.state_dict().items()})
    step(8)
    return found + [p.detach().cpu().sum().item() for p in model.parameters()]

plain, staged = numbers("cpu"), numbers("cuda")
print(len(plain), max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(plain, staged)))
"""


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param("pp=2,micro=4,schedule=interleaved", marks=pytest.mark.slow),
        "pp=4,micro=4,schedule=zero_bubble,recompute=full",
        pytest.param("pp=2,micro=4", marks=pytest.mark.slow),
        pytest.param("pp=4,micro=4,schedule=gpipe,recompute=full", marks=pytest.mark.slow),
        pytest.param("dp=2,pp=2,micro=2", marks=pytest.mark.slow),
        pytest.param("dp=2,pp=2,micro=3,schedule=zero_bubble,distribute_param=true", marks=pytest.mark.slow),
        pytest.param("tp=2,pp=2,micro=4,schedule=interleaved,recompute=default", marks=pytest.mark.slow),
    ],
)
def test_evaluation_other_batches_accumulation_and_reading_are_exact(plan: str) -> None:
    done = run(SCRIPT, MOAI_PLAN=plan, MOAI_DEVICES="2" if plan.startswith("pp=2") else "4")
    assert done.returncode == 0, done.stderr
    count, worst = done.stdout.split()
    assert int(count) > 40 and float(worst) < 1e-10


DROPPING = """
import torch.nn as nn, torch.nn.functional as F
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
blocks = [nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, 16)) for _ in range(4)]
model = nn.Sequential(*blocks).cuda()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
for _ in range(3):
    loss = model(torch.randn(8, 16).cuda()).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item())
print(*(p.detach().cpu().sum().item() for p in model.parameters()), sep="\\n")
"""


@pytest.mark.slow
def test_dropout_draws_the_numbers_of_one_device() -> None:
    def numbers(plan: str, devices: int) -> list[float]:
        done = run(DROPPING, MOAI_PLAN=plan, MOAI_DEVICES=str(devices))
        assert done.returncode == 0, done.stderr
        return [float(x) for x in done.stdout.split()]

    staged = numbers("pp=2,micro=4,schedule=interleaved", 2)
    assert staged == pytest.approx(numbers("dp=1", 1), rel=1e-10, abs=1e-12)


def test_more_stages_than_layers_are_refused_with_the_reason() -> None:
    few = SCRIPT.replace("range(4)", "range(3)").replace("blocks[3]", "blocks[0]")
    done = run(few, MOAI_PLAN="pp=4,micro=4", MOAI_DEVICES="4")
    assert_fails_clearly(done, "pp=4", "there are more stages than layers, of which the model has 3")
