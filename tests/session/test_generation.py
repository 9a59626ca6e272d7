"""Texts that transformers generates on the accelerator: those of one device, and no token is a new graph."""

from __future__ import annotations

import subprocess

import pytest

from tests.session.test_scripts import run

SCRIPT = """
import sys, transformers
from moai import session
common = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
sizes["num_key_value_heads"] = 2
config = {
    "llama": lambda: transformers.LlamaConfig(**sizes, **common),
    "qwen3": lambda: transformers.Qwen3Config(**sizes, **common),
    "mistral": lambda: transformers.MistralConfig(**sizes, **common, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **common),
}[KIND]()
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config).double().eval().to(DEVICE)
for length in (7, 7, 9):
    ids = torch.randint(3, 97, (3, length)); mask = torch.ones_like(ids)
    mask[0, :3] = 0; ids[0, :3] = 2
    given = {"attention_mask": mask.to(DEVICE), "max_new_tokens": 20, "do_sample": False}
    print(model.generate(ids.to(DEVICE), **given).cpu().tolist())
    if DEVICE == "cuda":
        print("graphs:", session.current().recorder.stats.graphs, file=sys.stderr)
"""
KINDS = ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3", "gpt2", "mistral"))]


def generated(kind: str, device: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = run(f"DEVICE, KIND = {device!r}, {kind!r}\n{SCRIPT}", **environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_that_of_one_device_and_its_tokens_share_a_graph(kind: str) -> None:
    done = generated(kind, "cuda", MOAI_PLAN="tp=2" if kind == "llama" else "")
    assert done.stdout == generated(kind, "cpu").stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("graphs:")]
    first, again, longer = (int(line.split()[1]) for line in lines)
    assert first <= 4  # what is asked of the prompt, the prompt, and one for all tokens
    assert again == first and longer <= first + 2
