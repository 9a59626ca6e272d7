"""Texts that transformers generates: the model's steps run on the accelerator, the loop around them on the host.

In: transformers' `generate`, for models on the accelerator. Out: the same texts, with two changes.

A static cache stands where there would have been one that grows with every token: every shape is a step of its own.
Its length is rounded up, so that texts of about the same length share their steps.

The tokens so far, their masks and scores are the host's while the loop runs: they grow with every token, and take
more time to be recorded than to be computed. Every token's scores are read anyway, if only to see whether it ends
the text. What a script adds to the loop (its own processors, criteria) is made for the device's tensors, and gets them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moai.device import owner
from moai.device.importing import when_imported

_HOME = "transformers.generation.utils"
# A cache's length is a multiple of this.
_LENGTHS = 64
# Arguments of `generate` with which it calls what the script wrote, or the model in a way of its own.
_OTHER_LOOPS = (
    *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model", "synced_gpus"),
    *("negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "prompt_lookup_num_tokens"),
    *("assistant_early_exit", "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "watermarking_config"),
)


def install() -> None:
    """Changes transformers when a script imports it. Call once."""
    when_imported(_HOME, _change)


def _change(module: Any) -> None:
    kind = module.GenerationMixin
    kind._prepare_cache_for_generation = _static(kind._prepare_cache_for_generation)
    kind.generate = _on_host(kind.generate)


def _static(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(prepare)
    def prepare_static(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, length: int, *rest: Any
    ) -> Any:
        if _would_grow(self, generation_config, model_kwargs):
            generation_config.cache_implementation = "static"
            length = -(-length // _LENGTHS) * _LENGTHS
        return prepare(self, generation_config, model_kwargs, mode, batch, length, *rest)

    return prepare_static


def _would_grow(model: Any, config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether the cache would, and need not."""
    return (
        _on_accelerator(model)
        and config.cache_implementation is None
        and config.use_cache is not False
        and not getattr(config, "is_assistant", False)
        and model_kwargs.get("past_key_values") is None
        and getattr(model, "_can_compile_fullgraph", False)
        and model._supports_default_dynamic_cache()
        and not torch.is_autocast_enabled("cuda")  # keys and values may have two dtypes, a static cache has one
    )


def _on_accelerator(model: Any) -> bool:
    return model.device.type not in ("cpu", "meta")


def _on_host(generate: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(generate)

    @functools.wraps(generate)
    def generate_on_host(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if not _on_accelerator(self) or not _may_stay(self, given):
            return generate(self, *args, **kwargs)
        tensors = [x for x in given.values() if isinstance(x, torch.Tensor)]
        home = self.device if any(x.device.type == self.device.type for x in tensors) or not tensors else "cpu"
        with _called_from_host(self):
            found = generate(**{name: _to_host(x) for name, x in given.items()})
        return _moved(found, home)

    return generate_on_host


def _may_stay(model: Any, given: dict[str, Any]) -> bool:
    """Whether the loop's own tensors may be on the host: only the model and transformers see them, and they are
    tokens and masks."""
    config = given.get("generation_config") or model.generation_config
    asked = {name: given.get(name, getattr(config, name, None)) for name in (*_OTHER_LOOPS, "guidance_scale")}
    return (
        not model.config.is_encoder_decoder
        and asked.pop("guidance_scale") in (None, 1, 1.0)
        and all(value is None or value is False or value == [] for value in asked.values())
        and not any(map(_is_data, given.values()))
    )


def _is_data(value: Any) -> bool:
    """Whether an argument has other tensors than of whole numbers."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(isinstance(x, torch.Tensor) or _is_data(x) for x in value)


def _to_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _moved(value: Any, device: Any) -> Any:
    """Arguments or results with their tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(_moved(x, device) for x in value)
    if isinstance(value, dict):  # transformers' outputs are
        return type(value)(**{name: _moved(x, device) for name, x in value.items()})
    return value


@contextmanager
def _called_from_host(model: Any) -> Iterator[None]:
    """While this holds, what the model is called with goes to its device."""
    from moai.device.decoding import Steps  # half of what turning the accelerator on would cost

    forward, own = model.forward, "forward" in vars(model)
    device = model.device
    steps = forward if own else Steps(model, forward, owner.current().recorder)

    @functools.wraps(forward)
    def moving(*args: Any, **kwargs: Any) -> Any:
        return steps(*_moved(args, device), **{name: _moved(x, device) for name, x in kwargs.items()})

    model.forward = moving
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward
