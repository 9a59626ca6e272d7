"""Runs one script as its own program.

    python tests/compatibility/child.py [--plain] [--chosen] [--host-random] script.py ...

--plain: as its author would have written it for a CPU. --chosen: under the plan that the planner chooses, in fp32.
--host-random: what it draws on its device is drawn by the CPU's generator, as the accelerator has random numbers of its
own.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CUDA = [
    (r"\.cuda\([^()]*\)", ".cpu()"),
    (r"\"cuda(:0)?\"", '"cpu"'),
    (r"GradScaler\(device,", 'GradScaler("cpu",'),
    (r"torch\.cuda\.(synchronize|reset_peak_memory_stats)\(\)", "None"),
    (r"torch\.device\(\"cpu\", \w+\)", 'torch.device("cpu")'),
    (r"torch\.cuda\.amp\.GradScaler\(", 'torch.amp.GradScaler("cpu", '),
    (r"\.pin_memory\(\)", ""),
    (r"pin_memory\": True", 'pin_memory": False'),
]


def for_a_cpu(source: str) -> str:
    """The text of a script that says "cuda", for a machine without one."""
    for said, instead in _CUDA:
        source = re.sub(said, instead, source)
    return source


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if not training or not p:
        return x
    return x * ((torch.rand(x.shape) >= p).to(x.dtype) / (1 - p)).to(x.device)


class HostRandom(TorchFunctionMode):
    """Random numbers of any device are the CPU generator's."""

    FACTORIES = frozenset({"rand", "randn", "randint", "randperm"})
    OF_A_TENSOR = frozenset({"rand_like", "randn_like", "randint_like", "multinomial", "bernoulli"})
    IN_PLACE = frozenset({"normal_", "uniform_", "bernoulli_"})

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = function.__name__
        if name in self.FACTORIES:
            device = kwargs.pop("device", None)
            made = function(*args, **kwargs)
            return made if device is None else made.to(device)
        if name in self.OF_A_TENSOR:
            device = kwargs.pop("device", None) or args[0].device
            return function(args[0].detach().cpu(), *args[1:], **kwargs).to(device)
        if name in self.IN_PLACE or getattr(function, "__module__", "") == "torch.nn.init":
            target = args[0] if args else kwargs.pop("tensor")
            with torch.no_grad():
                target.copy_(function(torch.empty(target.shape, dtype=target.dtype), *args[1:], **kwargs))
            return target
        if function is torch.nn.functional.dropout:
            return _dropout(*args, **kwargs)
        return function(*args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--host-random", action="store_true")
    parser.add_argument("--chosen", action="store_true")
    parser.add_argument("script", type=Path)
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    sys.argv = [str(arguments.script), *arguments.rest]
    sys.path[0] = str(arguments.script.parent)
    source = arguments.script.read_text()
    source = for_a_cpu(source) if arguments.plain else source
    if arguments.plain and "torch.compile(" in source:
        torch.compiler.set_stance("force_eager")
    if arguments.chosen:
        torch.moreh.option.enable_advanced_parallelization(mixed_precision=False)  # type: ignore[attr-defined]
    module = type(sys)("__main__")
    module.__file__ = str(arguments.script)
    sys.modules["__main__"] = module
    if arguments.host_random:
        HostRandom().__enter__()
    exec(compile(source, str(arguments.script), "exec"), module.__dict__)


if __name__ == "__main__":
    main()
