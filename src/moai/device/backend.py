"""The accelerator's operator kernels: every aten operator that reaches the device goes to the recorder.

In: calls that torch's dispatcher makes on accelerator tensors (and, for factories, on the "cuda" that C++ parses out
of a string). Out: recorded calls. `install` registers about two thousand kernels (0.3 s), so it runs at the device's
first use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moai.capture import provenance
from moai.capture.operators import UNANNOTATED_WRITERS, Operator
from moai.capture.recorder import Recorder
from moai.device import attention, bags, kernels, random, recurrent
from moai.device.conjugates import resolving

aten = torch.ops.aten

# Not ours: layouts and back ends that accelerator tensors never have, and what C++ does with a tensor's metadata alone.
_FOREIGN = ("_cudnn", "mkldnn", "quantized", "sym_", "_test", "_mkldnn", "miopen", "_nested", "_sparse", "_mps", "_xpu")
_FOREIGN_PARTS = ("sparse", "nested", "_coalesced", "cudnn", "qscheme", "jagged")
_METADATA = frozenset(
    {
        *("is_same_size", "record_stream", "is_set_to", "_has_same_storage_numel", "is_pinned", "_is_zerotensor"),
        *("is_complex", "size", "stride", "data", "_fw_primal", "_make_dual", "detach_", "_lazy_clone", "item"),
        *("is_coalesced", "dense_dim", "sparse_dim", "_fused_sdp_choice", "_version", "set_data", "retain_grad"),
        *("requires_grad_", "_reshape_copy", "_efficientzerotensor", "pin_memory", "_pin_memory", "lift", "_backward"),
        "lift_fresh_copy",
    }
)
# Factories that are recorded whole; torch composes the others (zeros, rand, eye, ...) of these and of in-place
# operators.
_FACTORIES = ("arange", "arange.start", "arange.start_step", "full", "scalar_tensor")

_libraries: list[torch.library.Library] = []


def install(recorder: Recorder) -> None:
    """Register all kernels. Call once a process."""
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    own = kernels.table(recorder) | random.table(recorder) | recurrent.table()
    for name, kernel in resolving(own.items()):
        library.impl(name, kernel, "PrivateUse1")
    for name in ("empty.memory_format", "empty_strided"):
        library.impl(name, own[name], "CUDA")
    for name in _FACTORIES:
        kernel = _factory(recorder, name)
        library.impl(name, kernel, "PrivateUse1")
        library.impl(name, kernel, "CUDA")
    recorded = _recorded_names(set(own) | set(_FACTORIES))
    for name, kernel in resolving((name, _recording(recorder, _overload(name))) for name in recorded):
        library.impl(name, kernel, "PrivateUse1")
    for name, kernel in (recurrent.table() | bags.table()).items():
        library.impl(name, kernel, "AutogradPrivateUse1")
    attention.install(recorder, library)
    bags.install()
    others = torch.library.Library("_", "IMPL")
    _libraries.append(others)
    others.fallback(_refuse, "PrivateUse1")
    for layout in ("SparsePrivateUse1", "SparseCsrPrivateUse1", "NestedTensorPrivateUse1"):
        others.fallback(_refuse_layout, layout)


def _refuse(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """An operator that torch does not compose of others and no device has: a library's own, or a foreign layout's."""
    raise NotImplementedError(
        f"The accelerator's devices have no kernel for {op}{provenance.in_script()}. Write it with torch's operators, "
        "or run it on the CPU: move its tensors there with .cpu(), and the result back with .to('cuda')."
    )


def _refuse_layout(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        f"The accelerator has no sparse or nested tensors, and {op} would make or use one{provenance.in_script()}. Use "
        "dense ones: tensor.to_dense(), nn.Embedding(sparse=False), padding with a mask."
    )


def _overload(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _recorded_names(taken: set[str]) -> list[str]:
    """The aten operators that are recorded as they are."""
    names = []
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full_name.partition("::")
        if namespace != "aten" or name in taken or not torch._C._dispatch_has_kernel(full_name):
            continue
        if _has(full_name, "CompositeImplicitAutograd") and not _has(full_name, "CPU"):
            continue
        packet = name.partition(".")[0]
        if packet in _METADATA or packet.startswith(_FOREIGN) or any(part in packet for part in _FOREIGN_PARTS):
            continue
        try:
            op = _overload(name)
        except AttributeError:
            continue
        if _is_recordable(op):
            names.append(name)
    return names


def _has(full_name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(full_name, key)


def _is_recordable(op: torch._ops.OpOverload) -> bool:
    """Takes and returns tensors, and returns no view (views are C++'s: they end in as_strided, which is a kernel of
    ours)."""
    schema = op._schema
    if torch.Tag.inplace_view in op.tags or torch.Tag.nondeterministic_seeded in op.tags:
        return False
    if schema.name in UNANNOTATED_WRITERS:
        return False
    if not any("Tensor" in str(a.type) for a in schema.arguments):
        return False
    if schema.returns and not any("Tensor" in str(r.type) for r in schema.returns):
        return False
    return not any(r.alias_info and not r.alias_info.is_write for r in schema.returns)


def _recording(recorder: Recorder, op: torch._ops.OpOverload) -> Callable[..., Any]:
    operator: Operator | None = None
    record = recorder.record

    def kernel(*args: Any, **kwargs: Any) -> Any:
        nonlocal operator
        if operator is None:
            operator = Operator(op)
        return record(operator, args, kwargs)

    return kernel


def _factory(recorder: Recorder, name: str) -> Callable[..., Any]:
    operator = Operator(_overload(name))

    def kernel(*args: Any, device: Any = None, layout: Any = None, pin_memory: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("dtype") is None:
            kwargs["dtype"] = _factory_dtype(args)
        return recorder.record(operator, args, kwargs)

    return kernel


def _factory_dtype(numbers: tuple[Any, ...]) -> torch.dtype:
    """The dtype that arange, full and scalar_tensor give to Python numbers."""
    scalars = [n for n in numbers if not isinstance(n, (list, tuple))]
    if any(isinstance(n, complex) for n in scalars):
        return torch.complex128 if torch.get_default_dtype() == torch.float64 else torch.complex64
    if any(isinstance(n, float) for n in scalars):
        return torch.get_default_dtype()
    return torch.bool if scalars and all(isinstance(n, bool) for n in scalars) else torch.int64
