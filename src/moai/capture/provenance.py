"""Where a call comes from, read off the interpreter's own stack when a call is described for the first time.

No hooks on modules: a step that is only replayed pays nothing for provenance.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import weakref
from functools import cache
from types import FrameType

import torch

from moai.graph.step_graph import Origin

_MODULE_CALL = torch.nn.Module._call_impl.__code__
_MODULE_APPLY = torch.nn.Module._apply.__code__
_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LIBRARIES = tuple(
    {os.path.dirname(torch.__path__[0]), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), _HOME}
)
_STATE_LOADERS = frozenset(
    {
        *("_apply", "load_state_dict", "_load_from_state_dict", "from_pretrained", "set_module_tensor_to_device"),
        "_materialize_copy",  # transformers' from_pretrained, in threads
    }
)

_names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()


def in_backward() -> bool:
    """Whether autograd makes the call."""
    return torch._C._current_graph_task_id() != -1


def origin_of_current_call(in_optimizer: bool) -> Origin:
    """Phase, innermost module's path, autograd sequence number and the script's line of the call being recorded. A
    closure that an optimizer calls (LBFGS) is a forward and a backward of its own."""
    backward = in_backward()
    updating = in_optimizer and not torch.is_grad_enabled()
    phase = "backward" if backward else "optimizer" if updating else "forward"
    node = torch._C._current_autograd_node() if backward else None
    if node is not None:
        return Origin("backward", node.name(), node._sequence_nr(), "")
    sequence = torch._C._autograd._get_sequence_nr() - 1 if phase == "forward" else -1
    return Origin(phase, _module_path(), sequence, script_line())  # type: ignore[arg-type]


def backward_keeps_graph() -> bool:
    """Whether the running backward pass was asked to retain its graph."""
    return in_backward() and torch._C._autograd._get_current_graph_task_keep_graph()


def script_line() -> str:
    """`file:line` of the innermost frame outside libraries; empty where there is none (autograd's own threads)."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not _is_library(frame.f_code.co_filename):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def in_script() -> str:
    """` at file:line` for messages, or nothing."""
    line = script_line()
    return f" at {line}" if line else ""


def loading_state() -> bool:
    """Whether the current upload moves a module or loads a state: what is uploaded lives on, unlike a batch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _STATE_LOADERS:
            return True
        frame = frame.f_back
    return False


def moving_module() -> bool:
    """Whether the current upload is torch moving a module's own parameter or buffer (Module.to, .cuda)."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _MODULE_APPLY:
            return True
        frame = frame.f_back
    return False


@cache
def _is_library(filename: str) -> bool:
    return filename.startswith("<") or filename.startswith(_LIBRARIES)


def _module_path() -> str:
    """Path of the innermost module being called, counted from the outermost one."""
    innermost = outermost = None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _MODULE_CALL:
            outermost = frame.f_locals["self"]
            if innermost is None:
                innermost = outermost
                if innermost in _names:
                    break
        frame = frame.f_back
    if innermost is None:
        return ""
    if innermost not in _names:
        assert outermost is not None
        for name, module in outermost.named_modules():
            _names.setdefault(module, name)
    return _names.get(innermost, type(innermost).__name__)
