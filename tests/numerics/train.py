"""A plain single-device script: trains small models, prints their losses as JSON. Run with a device and case names.

Every case trains 20 steps at batch 7 with labels that are ignored unevenly, which is where averages of averages go
wrong.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

STEPS, BATCH, SEQ, VOCAB = 20, 7, 12, 96


class Fp64Transformer(nn.Module):
    """Two pre-norm blocks with tied embeddings, all of it in double precision."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.position = nn.Parameter(torch.randn(SEQ, 32) * 0.1)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) + self.position
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Dropout(dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def hugging_face(kind: str, attention: str = "sdpa") -> nn.Module:
    import transformers as t

    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    }
    configs: dict[str, Callable[[], object]] = {
        "qwen2": lambda: t.Qwen2Config(tie_word_embeddings=True, **common),
        "llama": lambda: t.LlamaConfig(**common),
        "mistral": lambda: t.MistralConfig(sliding_window=8, **common),
        "gpt2": lambda: t.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
        "opt": lambda: t.OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB,
            max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0,
        ),
    }  # fmt: skip
    config = configs[kind]()
    config._attn_implementation = attention  # type: ignore[attr-defined]
    return t.AutoModelForCausalLM.from_config(config)


def optimizer(name: str, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    make: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        "single": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    }
    return make[name](parameters)


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        ids = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
        labels = ids.clone()
        labels[0, : step % SEQ] = -100
        labels[2] = -100
        labels[5, 3:] = -100
        yield ids, labels


def train(case: str, device: str) -> list[float]:
    """The losses of a case: model.optimizer[.extra...] with extras eager, double, clip, accumulate, twice, mask."""
    kind, optimizer_name, *extras = case.split(".")
    torch.manual_seed(0)
    own = kind in ("fp64", "dropout")
    model = (
        Fp64Transformer(0.2 if kind == "dropout" else 0.0)
        if own
        else hugging_face(kind, *[e for e in extras if e == "eager"])
    )
    if "double" in extras:
        model.double()
    model.to(device).train()
    parameters = list(model.parameters())
    if "twice" in extras:  # two optimizers, one model
        optimizers = [optimizer(optimizer_name, iter(parameters[::2])), optimizer("sgd", iter(parameters[1::2]))]
    else:
        optimizers = [optimizer(optimizer_name, iter(parameters))]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizers[0], 0.1, 1.0, STEPS)
    losses = []
    for ids, labels in batches():
        parts = [slice(0, 3), slice(3, BATCH)] if "accumulate" in extras else [slice(None)]
        total = torch.zeros((), device=device)
        for part in parts:
            inputs = {"input_ids": ids[part].to(device), "labels": labels[part].to(device)}
            if "mask" in extras:
                mask = torch.ones_like(ids[part])
                mask[0, :3] = 0
                inputs["attention_mask"] = mask.to(device)
            output = model(**inputs) if own else model(**inputs, use_cache=False).loss
            (output / len(parts)).backward()
            total = total + output.detach() / len(parts)
        if "clip" in extras:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for one in optimizers:
            one.step()
            one.zero_grad()
        schedule.step()
        losses.append(total.item())
    return losses


if __name__ == "__main__":
    device, *cases = sys.argv[1:]
    print(json.dumps({case: train(case, device) for case in cases}))
