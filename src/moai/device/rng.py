"""The accelerator's random numbers: seeds for random operators.

In: `torch.manual_seed`, generators, saved states. Out: one 63-bit seed a random operator. An operator draws all its
numbers from its seed, whatever the plan, so a run is reproducible for a seed. It is not CUDA's Philox sequence:
dropout masks differ from those of a GPU with the same seed.
"""

from __future__ import annotations

import struct
import weakref

import torch

_STATE = struct.Struct("<QQ")  # seed, offset
_MASK = (1 << 64) - 1
DEFAULT_SEED = 67280421310721  # torch's own, c10::detail::default_rng_seed_val


class Stream:
    """A sequence of operator seeds: a seed, and how many were drawn."""

    __slots__ = ("__weakref__", "offset", "seed")

    def __init__(self, seed: int = DEFAULT_SEED) -> None:
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Starts the sequence of `seed`, an int of at most 64 bits (negative ones wrap, as torch's do)."""
        if not -(1 << 63) <= seed <= _MASK:
            raise RuntimeError(f"A seed of at most 64 bits is expected, not {seed}.")
        self.seed, self.offset = seed & _MASK, 0

    def next_seed(self) -> int:
        """The next seed, 0 <= seed < 2**63."""
        self.offset += 1
        return _mix(_mix(self.seed) + self.offset) >> 1

    def get_state(self) -> torch.Tensor:
        """uint8[16] on the CPU."""
        return torch.frombuffer(bytearray(_STATE.pack(self.seed, self.offset)), dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> None:
        """Takes what `get_state` gave. Raises TypeError or RuntimeError for anything else."""
        if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
            raise TypeError("The state of a random number generator must be a torch.ByteTensor.")
        if state.numel() != _STATE.size:
            raise RuntimeError(
                f"The state of the accelerator's random number generator has {_STATE.size} bytes; this one has "
                f"{state.numel()}. Was it taken from another kind of device?"
            )
        self.seed, self.offset = _STATE.unpack(bytes(state.cpu().tolist()))


_default = Stream()
_streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()


def manual_seed(seed: int) -> None:
    """Seeds the accelerator's default stream."""
    _default.reseed(int(seed))


def initial_seed() -> int:
    """The seed that the default stream was started with."""
    return _default.seed


def get_state() -> torch.Tensor:
    """The default stream's state: uint8[16] on the CPU."""
    return _default.get_state()


def set_state(state: torch.Tensor) -> None:
    """Puts the default stream back to a state that `get_state` gave."""
    _default.set_state(state)


def default_stream() -> Stream:
    """The stream of operators that are given no generator."""
    return _default


def attach(generator: torch.Generator, stream: Stream) -> None:
    """Gives `generator` the stream that operators on the accelerator draw from, for as long as the stream lives.

    Known by the address of its C++ half: C++ hands operators another Python object for the same generator.
    """
    _streams[generator._cdata] = stream  # type: ignore[attr-defined]


def next_seed(generator: torch.Generator | None = None) -> int:
    """The seed of the next random operator, 0 <= seed < 2**63, drawn from `generator` or from the default stream.

    Raises RuntimeError if the generator is another device's.
    """
    stream = _default if generator is None else _streams.get(generator._cdata)  # type: ignore[attr-defined]
    if stream is None:
        assert generator is not None
        raise RuntimeError(
            f"Expected a 'cuda' device type for generator but found '{generator.device.type}'. "
            "Use torch.Generator('cuda') for tensors on the accelerator."
        )
    return stream.next_seed()


def _mix(x: int) -> int:
    """SplitMix64: neighbouring inputs give unrelated outputs."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
