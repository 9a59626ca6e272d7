"""What a script saves and loads of tensors that are spread over devices. Every test runs a real script."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.session.test_scripts import run

PLANS = {
    "sharded": "dp=2,distribute_param=true",
    "tensors": "tp=2",
    "stages": "pp=2,micro=2,distribute_param=true",
}
LLAMA = """
import sys, transformers
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)).to('cuda')
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(2):
    ids = torch.randint(0, 96, (8, 16)).to('cuda')
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step(); optimizer.zero_grad()
model.save_pretrained(sys.argv[1], max_shard_size='40KB')
torch.save({name: x.cpu() for name, x in model.state_dict().items()}, sys.argv[1] + '/expected')
"""
# What the script's process needs while it saves a model that it has never held: 10 tensors of 34 MiB.
LARGE = """
import sys
from safetensors.torch import save_file
def peak():
    status = dict(line.split(':') for line in open('/proc/self/status'))
    return int(status['VmHWM'].split()[0]) / 1024
model = torch.nn.Sequential(*(torch.nn.Linear(3000, 3000, bias=False, device='cuda') for _ in range(10)))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
model(torch.randn(2, 3000).cuda()).sum().backward()
optimizer.step(); optimizer.zero_grad()
print(model[0].weight.sum().item())
before = peak()
save_file(model.state_dict(), sys.argv[1] + '/model.safetensors')
print(peak() - before)
torch.save(model.state_dict(), sys.argv[1] + '/model.pt')
print(peak() - before)
"""


def run_in(folder: Path, script: str, *arguments: str, **environment: str) -> list[str]:
    """What a script prints, to which the folder is its first argument."""
    script = f"import sys; sys.argv[1:] = {[str(folder), *arguments]!r}\n{script}"
    done = run(script, MOAI_COMPILE="never", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "plan",
    [pytest.param(p, id=name, marks=() if name == "stages" else pytest.mark.slow) for name, p in PLANS.items()],
)
def test_a_model_is_saved_in_shards_that_transformers_loads(tmp_path: Path, plan: str) -> None:
    run_in(tmp_path, LLAMA, MOAI_DEVICES="2", MOAI_PLAN=f"{plan},precision=fp32")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert (tmp_path / "model.safetensors.index.json").exists() and not list(tmp_path.glob(".*"))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, expected in torch.load(tmp_path / "expected").items():
        assert torch.equal(loaded[name], expected), name


def test_a_model_that_no_process_holds_whole_is_saved_without_one(tmp_path: Path) -> None:
    _, shards, pickled = map(float, run_in(tmp_path, LARGE, MOAI_DEVICES="2", MOAI_PLAN=PLANS["sharded"]))
    assert shards < 10
    assert pickled < 4 * 34  # a tensor at a time
    loaded, expected = load_file(tmp_path / "model.safetensors"), torch.load(tmp_path / "model.pt", map_location="cpu")
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------- training goes on, on another accelerator

TRAIN = """
import os, sys, torch.nn as nn, torch.nn.functional as F
folder, first, last = sys.argv[1], *map(int, sys.argv[2:4])
device = 'cuda' if torch.cuda.is_available() else 'cpu'
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
torch.manual_seed(0)
model = Tied().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
if first:
    state = torch.load(folder + '/state.pt', map_location=device)
    model.load_state_dict(state['model']); optimizer.load_state_dict(state['optimizer'])
for step in range(first, last):
    torch.manual_seed(step + 1)
    x = torch.randint(0, 29, (8, 7)).to(device)
    loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    print(loss.item())
torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, folder + '/state.pt')
"""
# Devices and plan of the first two steps, and of the next two; 0 devices are plain PyTorch.
MOVES = {
    "sharded on 2, stages on 4": ((2, PLANS["sharded"]), (4, "tp=2,pp=2,micro=2,distribute_param=true")),
    "stages on 4, then 1": ((4, "dp=2,pp=2,micro=2,distribute_param=true"), (1, "")),
    "low precision shards on 2, then tensors on 4": (
        (2, "dp=2,micro=2,distribute_param=true,distribute_low_prec_param=true"),
        (4, "dp=2,tp=2"),
    ),
    "1, then stages on 2": ((1, ""), (2, PLANS["stages"])),
    "stages on 2, then plain PyTorch": ((2, PLANS["stages"]), (0, "")),
    "plain PyTorch, then sharded on 4": ((0, ""), (4, "dp=4,distribute_param=true")),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of four steps of plain PyTorch."""
    return [float(loss) for loss in run_in(tmp_path_factory.mktemp("plain"), TRAIN, "0", "4", MOAI_CUDA="0")]


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(*m, id=name, marks=pytest.mark.slow if i else ()) for i, (name, m) in enumerate(MOVES.items())],
)
def test_training_goes_on_exactly_on_another_accelerator(
    uninterrupted: list[float], tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    found = []
    for (devices, plan), steps in ((before, ("0", "2")), (after, ("2", "4"))):
        where = {"MOAI_CUDA": "1", "MOAI_DEVICES": str(devices)} if devices else {"MOAI_CUDA": "0", "MOAI_DEVICES": ""}
        found += run_in(tmp_path, TRAIN, *steps, MOAI_PLAN=plan and f"{plan},precision=fp64", **where)
    assert list(map(float, found)) == pytest.approx(uninterrupted, rel=1e-10)
