"""`torch.Generator("cuda")`: a generator for random operators on the accelerator.

In: `torch.Generator(device=...)`. Out: for the accelerator a `Generator` of this module, whose `stream` gives the
operators their seeds (`moai.device.rng`); for any other device torch's own. To C++, which knows no generator of this
device, it is a generator of the CPU: passed to an operator on CPU tensors it is not refused, as a CUDA generator
would be, but draws from its seed.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch

from moai.device import inplace, rng


class Generator(torch.Generator):
    """A generator of the accelerator. Made by `torch.Generator("cuda")`."""

    stream: rng.Stream

    def use(self, stream: rng.Stream) -> None:
        """Gives operators their seeds from `stream` from now on."""
        self.stream = stream
        rng.attach(self, stream)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def manual_seed(self, seed: int) -> Generator:
        """Starts the sequence of `seed` over; returns self."""
        self.stream.reseed(int(seed))
        super().manual_seed(int(seed))
        return self

    def seed(self) -> int:
        """Starts a sequence that nobody chose; returns its seed."""
        seed = secrets.randbits(63)
        self.manual_seed(seed)
        return seed

    def initial_seed(self) -> int:
        """The seed that the sequence was started with."""
        return self.stream.seed

    def get_state(self) -> torch.Tensor:
        """uint8[16] on the CPU."""
        return self.stream.get_state()

    def set_state(self, new_state: torch.Tensor) -> Generator:  # type: ignore[override]
        """Puts the generator back to a state that `get_state` gave; returns self."""
        self.stream.set_state(new_state)
        return self

    def clone_state(self) -> Generator:
        """A generator of its own that goes on from here."""
        return _make(self.stream.seed, self.stream.offset)

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (self.stream.seed, self.stream.offset)


def default() -> Generator:
    """The generator behind `torch.cuda.manual_seed`: it shares the accelerator's default stream."""
    generator = torch.Generator("cuda")
    assert isinstance(generator, Generator)
    generator.use(rng.default_stream())
    return generator


def install() -> None:
    """Changes `torch.Generator` in place. Call once, after `torch_device.install`."""
    construct = inplace.constructor(torch.Generator)

    def new(cls: type, device: Any = "cpu") -> torch.Generator:
        device = torch.device(device) if isinstance(device, str | int) else device
        if device.type != "cuda":
            return construct(cls, (device,), {})
        generator = construct(Generator, (), {})
        generator.use(rng.Stream())
        return generator

    inplace.change(torch.Generator, {"__new__": staticmethod(new)})


def _make(seed: int, offset: int) -> Generator:
    generator = torch.Generator("cuda")
    assert isinstance(generator, Generator)
    generator.manual_seed(seed)
    generator.stream.offset = offset
    return generator
