"""Caches of keys and values that keep their shape while transformers generates a text.

In: transformers' `generate`, for models on the accelerator. Out: the same, with a static cache where it would have
made one that grows with every token: every shape is a step of its own. Its length is rounded up, so that texts of
about the same length share their steps.
"""

from __future__ import annotations

import functools
from typing import Any

from moai.device.importing import when_imported

_HOME = "transformers.generation.utils"
# A cache's length is a multiple of this.
_LENGTHS = 64


def install() -> None:
    """Changes transformers when a script imports it. Call once."""
    when_imported(_HOME, _change)


def _change(module: Any) -> None:
    kind = module.GenerationMixin
    prepare = kind._prepare_cache_for_generation

    @functools.wraps(prepare)
    def prepare_static(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, length: int, *rest: Any
    ) -> Any:
        if _would_grow(self, generation_config, model_kwargs):
            generation_config.cache_implementation = "static"
            length = -(-length // _LENGTHS) * _LENGTHS
        return prepare(self, generation_config, model_kwargs, mode, batch, length, *rest)

    kind._prepare_cache_for_generation = prepare_static


def _would_grow(model: Any, config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether the cache would, and need not."""
    return (
        model.device.type not in ("cpu", "meta")
        and config.cache_implementation is None
        and config.use_cache is not False
        and not getattr(config, "is_assistant", False)
        and model_kwargs.get("past_key_values") is None
        and getattr(model, "_can_compile_fullgraph", False)
        and model._supports_default_dynamic_cache()
    )
