"""Baichuan2 as its 13B has it: a decoder like Llama's that knows distances between tokens from ALiBi alone.

transformers does not have this model; on the hub it comes as code of its own. This file is a model of the same
parameters, names and numbers, in plain PyTorch. Importing it makes transformers' Auto classes know it. A folder that is
saved holds a copy of this file, so that it opens anywhere with `trust_remote_code=True`.

ALiBi ("attention with linear biases"): head h adds `-slope[h] * (query - key)` to its scores, so that what is far away
counts less, and no position is ever embedded.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast


class BaichuanConfig(PretrainedConfig):
    model_type = "baichuan"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 125696,
        hidden_size: int = 5120,
        intermediate_size: int = 13696,
        num_hidden_layers: int = 40,
        num_attention_heads: int = 40,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **others,
    ) -> None:
        if "max_position_embeddings" in others or vocab_size == 64000:
            raise ValueError(
                "This is another Baichuan, with positions or a head of another kind: only Baichuan2-13B is known."
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        defaults = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
        super().__init__(**{**defaults, **others})


def slopes(heads: int) -> torch.Tensor:
    """ALiBi's slope of each head, [heads]: a geometric series from one half to 1/256 where `heads` is 8.

    Of a number that is no power of two, the heads beyond that power have every other slope of the next one.
    """

    def series(power: int) -> list[float]:
        return [2 ** (-8 * (head + 1) / power) for head in range(power)]

    power = 2 ** int(math.log2(heads))
    return torch.tensor(series(power) + series(2 * power)[::2][: heads - power])


def attention_bias(
    heads: int, queries: torch.Tensor, keys: int, attention_mask: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What is added to the scores, [1 or batch, heads, queries, keys]: ALiBi, and the least number where none may look.

    `queries` holds the positions of the queries, [queries]; keys have the positions 0, 1, ... `attention_mask`,
    [batch, at most keys], is 0 where there is padding. Padding behind the text needs no mask, as nothing looks ahead.
    """
    distance = torch.arange(keys, device=queries.device) - queries[:, None]
    least = torch.finfo(dtype).min
    bias = slopes(heads).to(queries.device)[:, None, None] * distance
    bias = bias.to(dtype).masked_fill(distance > 0, least)[None]
    if attention_mask is None:
        return bias
    seen = F.pad(attention_mask, (0, keys - attention_mask.shape[1]))
    return bias.masked_fill(seen[:, None, None, :] == 0, least)


class Attention(nn.Module):
    def __init__(self, config: BaichuanConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.width = config.hidden_size // config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        batch, length, size = hidden.shape
        parts = self.W_pack(hidden).chunk(3, dim=-1)
        query, key, value = (part.view(batch, length, -1, self.width).transpose(1, 2) for part in parts)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, size))


class MLP(nn.Module):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class DecoderLayer(nn.Module):
    def __init__(self, config: BaichuanConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), bias, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class NormHead(nn.Linear):
    """Logits from directions: every token's weights count with length one."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, F.normalize(self.weight))


class Decoder(nn.Module):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
        length = hidden.shape[1]
        past, keys = (0, length) if cache is None else (cache.get_seq_length(), cache.get_mask_sizes(length, 0)[0])
        queries = torch.arange(length, device=hidden.device) + past
        bias = attention_bias(self.heads, queries, keys, attention_mask, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, bias, cache)
        return self.norm(hidden)


class BaichuanForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = BaichuanConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _no_split_modules = ("DecoderLayer",)

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, past_key_values, **others):
        """`generate` hands on its mask as it is: ALiBi has to be added to what would be made of it."""
        return attention_mask

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others,
    ) -> CausalLMOutputWithPast:
        """`input_ids` [batch, length] -> logits [batch, length or logits_to_keep, vocabulary], and the loss."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.model(hidden, attention_mask, past_key_values)
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


AutoConfig.register(BaichuanConfig.model_type, BaichuanConfig, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
BaichuanConfig.register_for_auto_class()
BaichuanForCausalLM.register_for_auto_class("AutoModelForCausalLM")
