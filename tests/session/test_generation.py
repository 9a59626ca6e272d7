"""Texts that transformers generates on the accelerator: those of one device, and no token is a new graph, or a call of
the model's modules."""

from __future__ import annotations

import itertools
import subprocess

import pytest

from tests.session.test_scripts import run

MODEL = """
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
def prompt(length):
    ids = torch.randint(3, 97, (3, length)); mask = torch.ones_like(ids)
    mask[0, :3] = 0; ids[0, :3] = 2
    return {"inputs": ids.to(DEVICE), "attention_mask": mask.to(DEVICE), "max_new_tokens": 20, "do_sample": False}
def count(name):
    if DEVICE == "cuda":
        print(f"{name}:", getattr(session.current().recorder.stats, name), file=sys.stderr)
"""
KINDS = ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3", "gpt2", "mistral"))]


def generated(script: str, device: str, kind: str = "llama", **environment: str) -> subprocess.CompletedProcess[str]:
    done = run(f"DEVICE, KIND = {device!r}, {kind!r}\n{MODEL}{script}", **environment)
    assert done.returncode == 0, done.stderr
    return done


def counts(name: str, done: subprocess.CompletedProcess[str]) -> list[int]:
    """What `count(name)` said, one after another."""
    return [int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith(f"{name}:")]


GREEDY = """
for length in (7, 7, 9):
    print(model.generate(**prompt(length)).cpu().tolist())
    count("graphs")
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_that_of_one_device_and_its_tokens_share_a_graph(kind: str) -> None:
    done = generated(GREEDY, "cuda", kind, MOAI_PLAN="tp=2" if kind == "llama" else "")
    assert done.stdout == generated(GREEDY, "cpu", kind).stdout
    first, again, longer = counts("graphs", done)
    assert first <= 4  # what is asked of the prompt, the prompt, and one for all tokens
    assert again == first and longer <= first + 2


OTHER_WAYS = """
ways = [
    {"do_sample": True, "top_k": 20, "temperature": 0.7},
    {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    {"num_beams": 2, "do_sample": True},
]
for way in ways:
    torch.manual_seed(3)
    found = model.generate(**prompt(7) | way)
    assert found.device.type == DEVICE
    print(found.tolist())
    count("graphs")
found = model.generate(**prompt(7), output_scores=True, output_hidden_states=True, return_dict_in_generate=True)
assert {x.device.type for x in (found.sequences, found.scores[1], found.hidden_states[1][0])} == {DEVICE}
print([round(x, 9) for scores in found.scores for x in scores[:, 5].tolist()])
print([round(x, 9) for states in found.hidden_states for x in states[-1][:, -1, 3].tolist()])
"""


def test_every_way_to_choose_tokens_gives_those_of_the_cpu() -> None:
    """With the same seed, as the loop is the host's: its random numbers are the CPU's."""
    done = generated(OTHER_WAYS, "cuda")
    assert done.stdout == generated(OTHER_WAYS, "cpu").stdout
    found = counts("graphs", done)
    assert max(b - a for a, b in itertools.pairwise(found)) <= 4


CHANGED = """
def hook(layer): layer.register_forward_hook(lambda module, given, found: found * 1.5)
def weight(layer): layer.mlp.down_proj.weight.mul_(-2)
def data(layer): model.lm_head.weight.data = model.lm_head.weight.data.flip(0)
def module(layer): layer.mlp.act_fn = torch.nn.Tanh()
def number(layer): layer.self_attn.scaling *= 3
class Meddler(transformers.generation.streamers.BaseStreamer):
    def __init__(self, change): self.n, self.change = 0, change
    def end(self): pass
    def put(self, tokens):
        self.n += 1
        if self.n == 6:
            with torch.no_grad(): self.change(model.model.layers[1])
for change in (number, module, data, weight, hook):
    how = {"streamer": Meddler(change), "output_scores": True, "return_dict_in_generate": True}
    for scores in model.generate(**prompt(7) | {"max_new_tokens": 9} | how).scores:
        print([round(x, 9) for x in scores[:, 3:6].flatten().tolist()])
"""


@pytest.mark.slow
def test_a_model_that_changes_while_it_generates_is_called_anew() -> None:
    done = generated(CHANGED, "cuda")
    assert done.stdout == generated(CHANGED, "cpu").stdout


OWN_PARTS = """
seen = []
class Own(transformers.LogitsProcessor):
    def __call__(self, ids, scores):
        seen.append((ids.device.type, scores.device.type))
        return scores + self.bias
own = Own(); own.bias = torch.linspace(0, 1, 97, device=DEVICE)
print(model.generate(**prompt(7), logits_processor=[own]).tolist())
assert set(seen) == {(DEVICE, DEVICE)}
"""

MIXED = """
with torch.autocast(DEVICE, dtype=torch.bfloat16):
    print(model.float().generate(**prompt(7) | {"max_new_tokens": 4}).shape)
"""


def test_it_generates_in_mixed_precision() -> None:
    assert generated(MIXED, "cuda").stdout == generated(MIXED, "cpu").stdout


def test_what_a_script_adds_to_the_loop_gets_tensors_of_the_device() -> None:
    assert generated(OWN_PARTS, "cuda").stdout == generated(OWN_PARTS, "cpu").stdout


STEPS = """
from moai.device import decoding
called = []
layer = type(model.model.layers[0])
forward = layer.forward
def counting(*args, **kwargs):
    called.append(1)
    return forward(*args, **kwargs)
counting.__module__ = forward.__module__
layer.forward = counting
model.generate(**prompt(7))
print(len(called))
"""


def test_a_token_is_generated_without_calling_the_models_modules() -> None:
    called = int(generated(STEPS, "cuda").stdout)
    assert called == 2 * 2  # in two layers: for the prompt, and for the first token


HOOKED = """
called = []
model.model.layers[0].register_forward_hook(lambda *_: called.append(1))
print(model.generate(**prompt(7)).tolist(), len(called))
"""


@pytest.mark.slow
def test_a_script_s_own_hook_is_called_for_every_token() -> None:
    assert generated(HOOKED, "cuda").stdout == generated(HOOKED, "cpu").stdout
