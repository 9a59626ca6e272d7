"""Models without weights: what a script builds or loads has shapes, and no memory.

In: torch, and transformers if the script imports it. Out: both changed for this process. Parameters are the
accelerator's from the start, so nothing is ever stored or initialised; `from_pretrained` makes a model of its config,
and reads no file with weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from moai.capture.recorder import Recorder
from moai.capture.values import Value, record_of
from moai.device.importing import when_imported
from moai.dry.values import Nowhere

_HOME = "transformers.modeling_utils"


def install(recorder: Recorder) -> None:
    """Changes torch, and transformers when it is imported. Call once, before the script begins."""
    _parameters(recorder)
    for name in [n for n in vars(torch.nn.init) if n.endswith("_") and not n.startswith("_")]:
        setattr(torch.nn.init, name, _unless_on_accelerator(getattr(torch.nn.init, name)))
    torch.optim.Optimizer.__init__ = _optimizer(recorder, torch.optim.Optimizer.__init__)  # type: ignore[method-assign]
    when_imported(_HOME, _change_transformers)


def _parameters(recorder: Recorder) -> None:
    """Parameters get a place on the accelerator instead of the host's memory; most of that has not been touched yet,
    and is given back."""
    new = torch.nn.Parameter.__new__

    def make(cls: Any, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        if type(data) is torch.Tensor and data.device.type in ("cpu", "cuda") and data.layout is torch.strided:
            data = _weightless(data.detach(), recorder)
        return new(cls, data, *args, **kwargs)

    torch.nn.Parameter.__new__ = staticmethod(make)  # type: ignore[assignment]


def _weightless(data: torch.Tensor, recorder: Recorder) -> torch.Tensor:
    if data.device.type == "cpu":
        data = recorder.allocate(tuple(data.size()), data.stride(), data.dtype)
    record = record_of(data)
    if record.value is not None and record.value.role == "undefined":
        record.value = Value(buffer=Nowhere())
    return data


def _unless_on_accelerator(initialise: Callable[..., Any]) -> Callable[..., Any]:
    """Initial values matter to nobody here."""

    @functools.wraps(initialise)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        on_accelerator = isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda"
        return tensor if on_accelerator else initialise(tensor, *args, **kwargs)

    return call


def _optimizer(recorder: Recorder, initialise: Callable[..., Any]) -> Callable[..., Any]:
    """What a script did to its parameters before it made an optimizer is no part of a step. What an optimizer holds
    lives until the process ends: a script may end right behind its step, and drop all that the step was for."""
    kept = []

    @functools.wraps(initialise)
    def call(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        if not recorder.segment.cursor.saw_backward:
            recorder.flush()
        initialise(self, *args, **kwargs)
        kept.append(self)

    return call


# ---------------------------------------------------------------- transformers


def _change_transformers(modeling_utils: Any) -> None:
    modeling_utils.PreTrainedModel.from_pretrained = classmethod(_from_config_alone)


def _from_config_alone(cls: Any, name: Any, *_: Any, config: Any = None, **kwargs: Any) -> Any:
    """`PreTrainedModel.from_pretrained`, but for the weights."""
    if kwargs.pop("quantization_config", None) is not None or getattr(config, "quantization_config", None):
        raise ValueError(f"{name} is quantized: its training step cannot be planned.")
    with_info = kwargs.pop("output_loading_info", False)
    dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
    if config is None or isinstance(config, (str, bytes)):
        config, kwargs = cls.config_class.from_pretrained(config or name, return_unused_kwargs=True, **kwargs)
    settings = {key: kwargs[key] for key in ("attn_implementation",) if key in kwargs}
    config.name_or_path = str(name)
    model = cls._from_config(config, dtype=loaded_dtype(config, dtype), **settings).eval()
    if not with_info:
        return model
    return model, {key: [] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}


def loaded_dtype(config: Any, asked: Any = None) -> torch.dtype:
    """That of the weights which `from_pretrained(dtype=asked)` loads: its config's by default since transformers 5,
    fp32 before."""
    import transformers

    if asked is None:
        asked = "auto" if int(transformers.__version__.partition(".")[0]) >= 5 else torch.float32
    if asked == "auto":
        asked = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    return getattr(torch, asked) if isinstance(asked, str) else asked
