"""A model's steps in a loop that calls it again and again: what the first calls did is done again at once.

In: calls of a transformers model while it generates, with tensors on the host or on the accelerator. Out: what the
model returns. A step of a small model takes longer to be recorded, module by module, than to be computed; its operators
are those of the step before, if the model is as it was.

That is taken as certain only if
- the model's code is transformers', PEFT's or PyTorch's, and no hooks or replaced methods run in it;
- everything that this code can read is as it was: the attributes of all modules, of the model's configurations and of
  the cache, object by object, and the storages of their tensors; the other arguments; PyTorch's modes;
- a call changes none of them but for what tensors hold, and how many tokens windows that are not full have seen.
In all other cases the model is called.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from typing import Any

import torch
from torch.nn.modules import module as torch_modules

from moai.capture.recorder import Recorder
from moai.capture.stretch import Stretch
from moai.capture.values import Record, record_of
from moai.device.kernels import on_accelerator

logger = logging.getLogger("moai")

# Whose code does the same with the same state, and keeps its state in attributes.
_TRUSTED = frozenset({"torch", "transformers", "peft"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# What a module has for other occasions than being called without gradients, beside what is empty where _HOOKS are.
_IDLE = frozenset(vars(torch.nn.Module())) - {"_parameters", "_buffers", "_modules", *_HOOKS}
# Of a cache's layer with a sliding window, the number of the tokens that it has seen.
_COUNT = "cumulative_length_int"
_GLOBAL_HOOKS = (torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)
# How often it is tried to do without the model, in one loop.
_ATTEMPTS = 3
_MAX_CONTAINERS = 200_000


class Steps:
    """`forward` of a model, for the time of one loop: it keeps alive what it has seen."""

    def __init__(self, model: Any, forward: Callable[..., Any], recorder: Recorder) -> None:
        self._model = model
        self._forward = forward
        self._recorder = recorder
        self._known: _Known | None = None
        self._last: Stretch | None = None
        self._attempts = _ATTEMPTS + 1  # the first call, of the prompt, is like no other

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        if not self._attempts or _other_modes():
            return self._forward(*args, **kwargs)
        given = _Given((args, kwargs, *_modes()))
        if self._known is not None:
            found = self._known.again(self._recorder, given)
            if found is not None:
                return found.value
            self._known = None
        self._attempts -= 1
        if self._attempts == _ATTEMPTS or not is_plain(self._model):
            return self._forward(*args, **kwargs)
        return self._call(given, functools.partial(self._forward, *args, **kwargs))

    def _call(self, given: _Given, forward: Callable[[], Any]) -> Any:
        state = _State((self._model, given.objects))
        value, stretch, why_not = self._recorder.taped(forward, given.tensors, lambda x: _Given(x).tensors)
        result = _Given(value)
        if stretch is not None:
            advance = state.advanced()
            if advance is None or not state.holds() or not state.has_room(0):
                why_not = "the model or its cache has changed"
            elif advance and not (self._last and stretch.same(self._last)):
                self._last = stretch  # once more, to see that nothing depends on how many tokens there are
            elif not state.has(stretch.external):
                why_not = "it takes a tensor from elsewhere"
            elif not {*map(id, result.objects)} <= {*map(id, given.objects)}:
                why_not = "it returns an object that it has made"
            else:
                self._known = _Known(given, state, stretch, advance, value)
        if why_not:
            logger.debug("Generating, the model is called for every token: %s.", why_not)
        return value


class _Found:
    """A result, which may be None."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Known:
    """What a call did, and all that this depends on."""

    def __init__(self, given: _Given, state: _State, stretch: Stretch, advance: int, result: Any) -> None:
        self._given = given.others
        self._state = state
        self._stretch = stretch
        self._advance = advance
        self._result = _template(result, count())

    def again(self, recorder: Recorder, given: _Given) -> _Found | None:
        """The same for other tensors; None, and nothing done, if the model has to be called."""
        state = self._state
        if given.others != self._given or not state.holds() or not state.has_room(self._advance):
            return None
        tensors = self._stretch.again(recorder, given.tensors)
        if tensors is None:
            return None
        state.advance(self._advance)
        return _Found(_filled(self._result, tensors))


class _Given:
    """Arguments of a call, or its result: `tensors` of the accelerator, the other `objects`, and `others`, everything
    but the tensors in a form that can be compared."""

    def __init__(self, values: Any) -> None:
        self.tensors: list[torch.Tensor] = []
        self.objects: list[Any] = []
        self.others: list[Any] = []
        self._add(values)

    def _add(self, value: Any) -> None:
        if on_accelerator(value):
            self.tensors.append(value)
            self.others.append(torch.Tensor)
        elif isinstance(value, dict):
            self.others.append((type(value), *value))
            for each in value.values():
                self._add(each)
        elif type(value) in (list, tuple):
            self.others.append((type(value), len(value)))
            for each in value:
                self._add(each)
        elif value is None or type(value) in (bool, int, float, str, torch.dtype):
            self.others.append((type(value), value))
        else:
            self.objects.append(value)
            self.others.append(id(value))


class _Slot(int):
    """Where in a result its tensors stand."""


def _template(value: Any, numbers: Iterator[int]) -> Any:
    if on_accelerator(value):
        return _Slot(next(numbers))
    if isinstance(value, dict):  # of transformers' outputs
        return type(value), {name: _template(x, numbers) for name, x in value.items()}
    if type(value) in (list, tuple):
        return type(value), [_template(x, numbers) for x in value]
    return type(None), value


def _filled(template: Any, tensors: list[torch.Tensor]) -> Any:
    if type(template) is _Slot:
        return tensors[template]
    kind, inside = template
    if kind is type(None):
        return inside
    if isinstance(inside, dict):
        return kind(**{name: _filled(x, tensors) for name, x in inside.items()})
    return kind([_filled(x, tensors) for x in inside])


class _State:
    """Everything that can be reached from some objects, one by one, when this was made.

    But for how many tokens the layers of a cache with sliding windows have seen: what they do is the same until a
    window is full.
    """

    def __init__(self, roots: Any) -> None:
        self._dicts: list[dict[Any, Any]] = []
        self._lists: list[Iterable[Any]] = []
        self._tensors: list[tuple[torch.Tensor, Record, torch.Size]] = []
        self._methods: list[tuple[Any, Any]] = []
        self._windows: list[Any] = []
        self._whole = self._look_at(roots)
        self._counts = [getattr(layer, _COUNT) for layer in self._windows]
        self._held = list(self._members())  # alive, so that their ids are not given again
        self._ids = list(map(id, self._held))

    def holds(self) -> bool:
        """Whether everything is as it was."""
        return (
            self._whole
            and list(map(id, self._members())) == self._ids
            and all(kind.forward is forward for kind, forward in self._methods)
            and all(x.untyped_storage()._moai is r and x.size() == size for x, r, size in self._tensors)  # type: ignore[attr-defined]
        )

    def advanced(self) -> int | None:
        """How many tokens the windows have seen since; 0 without windows, None if they are not of one mind."""
        found = {getattr(layer, _COUNT) - count for layer, count in zip(self._windows, self._counts, strict=True)}
        return found.pop() if len(found) == 1 else None if found else 0

    def has_room(self, tokens: int) -> bool:
        """Whether so many tokens more fit into the windows."""
        return all(getattr(layer, _COUNT) + tokens <= layer.max_cache_len for layer in self._windows)

    def advance(self, tokens: int) -> None:
        """So many have been seen."""
        for layer in self._windows:
            setattr(layer, _COUNT, getattr(layer, _COUNT) + tokens)

    def has(self, records: Iterable[Record]) -> bool:
        """Whether the storages are of tensors in here."""
        known = {id(record) for _, record, _ in self._tensors}
        return all(id(record) in known for record in records)

    def _members(self) -> Iterable[Any]:
        windows = (x for layer in self._windows for name, x in vars(layer).items() if name != _COUNT)
        return chain(chain.from_iterable(map(dict.values, self._dicts)), chain.from_iterable(self._lists), windows)

    def _look_at(self, roots: Any) -> bool:
        """Whether there was an end to it."""
        seen: set[int] = set()
        waiting = [roots]
        while waiting and len(seen) < _MAX_CONTAINERS:
            value = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if on_accelerator(value):
                self._tensors.append((value, record_of(value), value.size()))
            elif isinstance(value, dict):
                self._dicts.append(value)
                waiting.extend(value.values())
            elif isinstance(value, (list, tuple, set, frozenset)):
                self._lists.append(value)
                waiting.extend(value)
            elif not isinstance(value, type) and _is_trusted(type(value)) and hasattr(value, "__dict__"):
                attributes = vars(value)
                if isinstance(value, torch.nn.Module):
                    self._methods.append((type(value), type(value).forward))
                    self._dicts.append(attributes)
                    waiting.extend(x for name, x in attributes.items() if name not in _IDLE)
                elif type(value).__name__ == "StaticSlidingWindowLayer":
                    self._windows.append(value)
                    waiting.extend(attributes.values())
                else:
                    waiting.append(attributes)
        self._methods = list(dict(self._methods).items())
        return not waiting


def is_plain(model: torch.nn.Module) -> bool:
    """Whether what the model does is code of known libraries alone."""
    return all(
        _is_trusted(type(module))
        and _is_trusted(type(module).forward)
        and _is_trusted(_attention_of(module))
        and (module is model or "forward" not in vars(module))
        and all(_is_trusted(hook) for name in _HOOKS for hook in getattr(module, name).values())
        for module in model.modules()
    )


def _attention_of(module: torch.nn.Module) -> Any:
    """What the module's configuration names as its attention, which may be the script's; else what stands in for it."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    known = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    return known.get(name, torch.nn.Module)


def _is_trusted(of: Any) -> bool:
    return (getattr(of, "__module__", None) or "").partition(".")[0] in _TRUSTED


def _modes() -> tuple[Any, ...]:
    """What PyTorch does beside calling operators, and may do for a model."""
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_inference_mode_enabled()


def _other_modes() -> bool:
    """Whether somebody looks on, or gradients are wanted."""
    watched = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return bool(watched) or torch.is_grad_enabled() or any(_GLOBAL_HOOKS)
