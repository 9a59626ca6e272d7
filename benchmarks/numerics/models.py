"""What is trained: small models of real architectures, and one in plain torch.

In: a name. Out: a `Model` that makes the same weights in every process. The sizes are chosen to be awkward: fewer
key/value heads than devices, vocabularies that no number of devices divides, tied and untied heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100  # the label that a loss does not count

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA: dict[str, Any] = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": 96}

Padding = Literal["none", "right", "both"]
Optimizer = Literal["foreach", "fused", "sgd"]


@dataclass(frozen=True, slots=True)
class Model:
    """`make`: the model, of so many layers, on the CPU. `own_loss`: the script works the loss out of the logits, in
    their precision.

    `stays_fp64`: in fp64, nothing of it drops to fp32. `takes_fp64`: it runs in fp64 at all. `draws`: it has dropout,
    whose numbers are the accelerator's own. `padding`: at which side of samples.
    """

    make: Callable[[int], nn.Module]
    vocabulary: int = 96
    padding: Padding = "both"
    optimizer: Optimizer = "foreach"
    own_loss: bool = False
    stays_fp64: bool = False
    takes_fp64: bool = True
    draws: bool = False

    def loss(self, model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over the labels that count. All [batch, seq]."""
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        if self.padding != "none":
            inputs["attention_mask"] = mask
        if not self.own_loss:
            loss: torch.Tensor = model(**inputs, labels=labels).loss
            return loss
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        precision = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(precision), labels[:, 1:].flatten(), ignore_index=IGNORED)


def _hugging_face(config: str, experts: str | None = None, **settings: Any) -> Callable[[int], nn.Module]:
    """A model of transformers; `experts` is its implementation of them."""

    def make(layers: int) -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**settings, num_hidden_layers=layers)
        made._experts_implementation = experts
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(made)
        return model

    return make


@dataclass(frozen=True, slots=True)
class _Output:
    logits: torch.Tensor


class _PlainLlama(nn.Module):
    """A Llama in one precision throughout: RMS norms, rotary positions, shared key/value heads, SwiGLU."""

    def __init__(self, layers: int, dropout: float = 0.0, hidden: int = 32, vocabulary: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(_Layer(hidden, dropout) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> _Output:
        x = self.embed(input_ids)
        n = input_ids.shape[1]
        seen = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(n, dtype=torch.bool, device=x.device)
        mask = (seen & attention_mask.bool()[:, None, :] | itself)[:, None]
        for layer in self.layers:
            x = layer(x, mask)
        return _Output(self.head(self.norm(x)))


class _Layer(nn.Module):
    heads, kv_heads = 4, 2

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.width = hidden // self.heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-6), nn.RMSNorm(hidden, eps=1e-6)
        self.q, self.out = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.k, self.v = (nn.Linear(hidden, self.kv_heads * self.width, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(hidden, 2 * hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * hidden, hidden, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (-1, self.width)).transpose(1, 2) for p in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(_rotated(q), _rotated(k), v, attn_mask=mask, enable_gqa=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        y = self.norm2(x)
        return x + self.dropout(self.down(F.silu(self.gate(y)) * self.up(y)))


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions; x is [batch, heads, seq, width]."""
    half = x.shape[-1] // 2
    speeds = 100.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angles = torch.arange(x.shape[2], dtype=x.dtype, device=x.device)[:, None] * speeds
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


MODELS = {
    "plain": Model(_PlainLlama, own_loss=True, stays_fp64=True),
    "dropout": Model(lambda layers: _PlainLlama(layers, 0.2), own_loss=True, stays_fp64=True, draws=True),
    "llama": Model(_hugging_face("LlamaConfig", **_LLAMA), optimizer="fused"),
    "llama-tied": Model(
        _hugging_face("LlamaConfig", **_LLAMA | {"num_key_value_heads": 1}, tie_word_embeddings=True), padding="none"
    ),
    "qwen2": Model(_hugging_face("Qwen2Config", **_LLAMA, tie_word_embeddings=True), optimizer="fused"),
    "qwen3": Model(_hugging_face("Qwen3Config", **_LLAMA, head_dim=8)),
    "mistral": Model(_hugging_face("MistralConfig", **_LLAMA, sliding_window=8)),
    # In fp64 plain PyTorch gives NaN where a query sees no key at all, which padding at the left makes happen. Nearly
    # all of it but the products is in fp32 even then, and AdamW would enlarge that rounding.
    "gemma2": Model(
        _hugging_face("Gemma2Config", **_LLAMA, head_dim=8, query_pre_attn_scalar=8, sliding_window=8), padding="right",
        optimizer="sgd",
    ),
    "gpt2": Model(
        _hugging_face(
            "GPT2Config",
            n_embd=32, n_head=4, n_positions=64, vocab_size=97, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        ),
        vocabulary=97, optimizer="sgd", own_loss=True, stays_fp64=True,
    ),
    "opt": Model(
        _hugging_face("OPTConfig", **_SIZES, ffn_dim=64, word_embed_proj_dim=32, vocab_size=97, dropout=0.0),
        vocabulary=97, own_loss=True, stays_fp64=True,
    ),
    "mixtral": Model(_hugging_face("MixtralConfig", **_LLAMA, num_local_experts=4), takes_fp64=False),
    "qwen3-moe": Model(
        _hugging_face(
            "Qwen3MoeConfig", **_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=8,
            experts="batched_mm", output_router_logits=True,
        )
    ),
}  # fmt: skip
