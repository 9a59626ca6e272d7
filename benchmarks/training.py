"""What is trained: a small Qwen2 on text that every machine has.

In: sizes. Out: a model with the same initial weights in every process, and the batches of a step on the CPU.
"""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

IGNORED = -100  # the label that a loss does not count


@dataclass(frozen=True, slots=True)
class Sizes:
    """A Qwen2 and its batch; `batch` and `seq` are the global batch's samples and their tokens. `tied`:
    whether the head is the embedding."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    seq: int
    batch: int
    tied: bool = True

    def model(self) -> PreTrainedModel:
        """The model on the CPU, in fp32, in training mode; its weights depend on the sizes only."""
        torch.manual_seed(0)
        config = Qwen2Config(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=self.seq,
            tie_word_embeddings=self.tied,
            use_cache=False,
        )
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


SMALL = Sizes(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=512, seq=32, batch=8)


def sizes(layers: int, hidden: int = 384) -> Sizes:
    """A Qwen2 that is large enough for kernels to decide the time, and small enough for two cores."""
    return Sizes(
        layers=layers, hidden=hidden, intermediate=2 * hidden, heads=6, kv_heads=2, vocab=4096, seq=256, batch=8
    )


class Corpus:
    """Source text of Python's standard library, two bytes a token; with `even`, no label is ignored."""

    def __init__(self, sizes: Sizes, even: bool = False) -> None:
        self._sizes = sizes
        self._even = even
        text = "".join(inspect.getsource(module) for module in (argparse, inspect)).encode()
        pairs = torch.frombuffer(bytearray(text[: len(text) // 2 * 2]), dtype=torch.int16)
        self._tokens = pairs.unique(return_inverse=True)[1] % sizes.vocab

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels of a step, [batch, seq] each.

        Sample i ignores the first i / batch of its labels, so the ranks of a data-parallel run count different numbers
        of labels, as they do where prompts are masked: the mean of their means is not the mean of the batch. If the
        corpus is even, it is.
        """
        samples, seq = self._sizes.batch, self._sizes.seq
        start = step * samples * seq
        wanted = torch.arange(start, start + samples * seq) % len(self._tokens)
        tokens = self._tokens[wanted].view(samples, seq)
        if self._even:
            return tokens, tokens.clone()
        ignored = torch.arange(samples)[:, None] * seq // samples
        return tokens, tokens.masked_fill(torch.arange(seq) < ignored, IGNORED)
