"""Random operators of the accelerator: each becomes one `moai.random` node with a seed of its own.

A seed comes from the generator given by the script, or from the accelerator's stream, and is an input of the graph:
the same step with new numbers is the same graph. Distributions that torch defines by a transform of uniform or normal
numbers are written so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

import moai.graph.ops  # noqa: F401  (registers torch.ops.moai)
from moai.capture.operators import Operator
from moai.capture.recorder import Recorder
from moai.capture.trace import Seed
from moai.device import rng

aten = torch.ops.aten


def table(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    """Operator name -> kernel."""
    draw = Operator(torch.ops.moai.random.default)
    randperm_op = Operator(torch.ops.moai.randperm.default)
    multinomial_op = Operator(torch.ops.moai.multinomial.default)

    def numbers(size: Any, dtype: torch.dtype, kind: str, a: float, b: float, generator: Any) -> torch.Tensor:
        seed = Seed(rng.next_seed(generator))
        return recorder.record(draw, (list(size), kind, float(a), float(b), seed, 0, dtype), {})

    def fill(self: torch.Tensor, kind: str, a: float, b: float, generator: Any) -> torch.Tensor:
        return self.copy_(numbers(self.shape, self.dtype, kind, a, b, generator))

    def bernoulli_from(self: torch.Tensor, p: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
        return self.copy_(numbers(self.shape, torch.float32, "uniform", 0.0, 1.0, generator) < p)

    def bernoulli(self: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
        return (numbers(self.shape, torch.float32, "uniform", 0.0, 1.0, generator) < self).to(self.dtype)

    def dropout(x: torch.Tensor, p: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
        if train is False or p == 0:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        mask = numbers(x.shape, torch.bool, "bernoulli", 1.0 - p, 0.0, None)
        return x * mask * (1.0 / (1.0 - p) if p < 1 else 0.0), mask

    def random_range(self: torch.Tensor, low: int, high: int | None, *, generator: Any = None) -> torch.Tensor:
        return fill(self, "randint", low, _exclusive_limit(self.dtype) if high is None else high, generator)

    def normal_like(self: torch.Tensor, mean: Any, std: Any, generator: Any) -> torch.Tensor:
        return numbers(self.shape, self.dtype, "normal", 0.0, 1.0, generator) * std + mean

    def randperm(n: int, *, out: torch.Tensor, generator: Any = None) -> torch.Tensor:
        seed = Seed(rng.next_seed(generator))
        return out.resize_(n).copy_(recorder.record(randperm_op, (n, seed, out.dtype), {}))

    def multinomial(probs: Any, num_samples: int, replacement: bool = False, *, generator: Any = None) -> torch.Tensor:
        seed = Seed(rng.next_seed(generator))
        return recorder.record(multinomial_op, (probs, num_samples, replacement, seed), {})

    def exponential_(self: torch.Tensor, lambd: float = 1.0, *, generator: Any = None) -> torch.Tensor:
        return fill(self, "exponential", lambd, 0.0, generator)

    def log_normal_(self: torch.Tensor, mean: float = 1.0, std: float = 2.0, *, generator: Any = None) -> torch.Tensor:
        return self.copy_(numbers(self.shape, self.dtype, "normal", mean, std, generator).exp())

    def geometric_(self: torch.Tensor, p: float, *, generator: Any = None) -> torch.Tensor:
        uniform = numbers(self.shape, torch.float32, "uniform", 0.0, 1.0, generator)
        if p == 1:
            return self.fill_(1)
        return self.copy_((uniform.neg_().log1p_() / math.log1p(-p)).ceil_().clamp_(min=1))

    return {
        "uniform_": lambda self, a=0.0, b=1.0, *, generator=None: fill(self, "uniform", a, b, generator),
        "normal_": lambda self, mean=0.0, std=1.0, *, generator=None: fill(self, "normal", mean, std, generator),
        "bernoulli_.float": lambda self, p=0.5, *, generator=None: fill(self, "bernoulli", p, 0.0, generator),
        "bernoulli_.Tensor": bernoulli_from,
        "bernoulli": bernoulli,
        "native_dropout": dropout,
        "random_": lambda self, *, generator=None: random_range(self, 0, None, generator=generator),
        "random_.to": lambda self, to, *, generator=None: random_range(self, 0, to, generator=generator),
        "random_.from": random_range,
        "normal.Tensor_float": lambda mean, std=1.0, *, generator=None: normal_like(mean, mean, std, generator),
        "normal.float_Tensor": lambda mean, std, *, generator=None: normal_like(std, mean, std, generator),
        "normal.Tensor_Tensor": lambda mean, std, *, generator=None: normal_like(mean, mean, std, generator),
        "randperm.generator_out": randperm,
        "multinomial": multinomial,
        "exponential_": exponential_,
        "log_normal_": log_normal_,
        "geometric_": geometric_,
    }


def _exclusive_limit(dtype: torch.dtype) -> int:
    """torch's `random_()` draws from all integers that the dtype holds exactly."""
    if dtype.is_floating_point:
        return 1 << {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    return 2 if dtype == torch.bool else torch.iinfo(dtype).max
