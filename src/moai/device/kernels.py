"""Kernels that are more than recording: copies to and from the host, views, allocation, reads.

Views are not recorded: a view is a geometry over a storage, which C++ works out, and capture reads off the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moai.capture import provenance
from moai.capture.geometry import contiguous_stride, span
from moai.capture.loading import hand_on
from moai.capture.operators import Operator
from moai.capture.recorder import Recorder

aten = torch.ops.aten
_CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def table(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    """Operator name -> kernel."""
    return _views(recorder) | _memory(recorder) | _copies(recorder) | _others(recorder)


def on_accelerator(value: Any) -> bool:
    """Whether something is a tensor of the accelerator."""
    return isinstance(value, torch.Tensor) and value.device.type not in ("cpu", "meta")


def _views(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    """View operators whose kernel torch gives to each device: the CPU's only touch metadata."""
    stats = recorder.stats

    def metadata_only(op: torch._ops.OpOverload) -> Callable[..., Any]:
        redispatch = op._handle.redispatch_boxed  # what `op.redispatch` calls, one frame later

        def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
            stats.views += 1
            return redispatch(_CPU_KERNELS, *args, **kwargs)

        return kernel

    names = ("as_strided", "view", "_reshape_alias", "unfold", "view_as_real", "view_as_complex")
    return {name: metadata_only(getattr(aten, name).default) for name in names}


def _memory(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    def empty_strided(
        size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
    ) -> torch.Tensor:
        return recorder.allocate(tuple(size), tuple(stride), dtype or torch.get_default_dtype())

    def empty(
        size: Any,
        dtype: Any = None,
        layout: Any = None,
        device: Any = None,
        pin_memory: Any = None,
        memory_format: Any = None,
    ) -> torch.Tensor:
        size = tuple(size)
        stride = contiguous_stride(size)
        if memory_format in (torch.channels_last, torch.channels_last_3d):
            stride = torch.empty(size, device="meta", memory_format=memory_format).stride()
        return empty_strided(size, stride, dtype)

    def set_window(self: torch.Tensor, storage: Any, offset: int, size: Any, stride: Any = ()) -> torch.Tensor:
        stride = stride or contiguous_stride(tuple(size))
        op = aten.set_.source_Storage_storage_offset
        return op.redispatch(_CPU_KERNELS, self, storage, offset, list(size), list(stride))

    def set_storage(self: torch.Tensor, storage: Any) -> torch.Tensor:
        return set_window(self, storage, 0, [storage.nbytes() // self.element_size()])

    def set_tensor(self: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        offset = int(source.storage_offset())
        return set_window(self, source.untyped_storage(), offset, source.size(), source.stride())

    def set_nothing(self: torch.Tensor) -> torch.Tensor:
        return set_tensor(self, torch.empty(0, dtype=self.dtype, device=self.device))

    def resize_(self: torch.Tensor, size: Any, *, memory_format: Any = None) -> torch.Tensor:
        size = tuple(size)
        stride = contiguous_stride(size)
        needed = (self.storage_offset() + span(size, stride)) * self.element_size()
        if needed <= self.untyped_storage().nbytes():
            return aten.as_strided_.default.redispatch(
                _CPU_KERNELS, self, list(size), list(stride), self.storage_offset()
            )
        larger = torch.empty(size, dtype=self.dtype, device=self.device)
        if self.numel():
            larger.view(-1)[: self.numel()].copy_(self.reshape(-1))
        return set_window(self, larger.untyped_storage(), 0, size, stride)

    return {
        "empty_strided": empty_strided,
        "empty.memory_format": empty,
        "set_.source_Storage_storage_offset": set_window,
        "set_.source_Storage": set_storage,
        "set_.source_Tensor": set_tensor,
        "set_": set_nothing,
        "resize_": resize_,
    }


def _copies(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    copy = Operator(aten.copy_.default)
    cast = Operator(aten._to_copy.default)

    def copy_(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not on_accelerator(self):
            with torch.no_grad():
                self.copy_(recorder.read(source))
            return self
        if source.device.type == "meta":
            return self
        if not on_accelerator(source):
            if recorder.fill_from_host(self, source):
                return self
            source = recorder.upload(source)
        if not hand_on(self, source, recorder.segment.epoch):
            recorder.record(copy, (self, source), {})
        return self

    def to_copy(
        self: torch.Tensor,
        *,
        dtype: Any = None,
        layout: Any = None,
        device: Any = None,
        pin_memory: Any = None,
        non_blocking: bool = False,
        memory_format: Any = None,
    ) -> torch.Tensor:
        kwargs = {k: v for k, v in (("dtype", dtype), ("memory_format", memory_format)) if v is not None}
        if not on_accelerator(self):  # torch dispatches by the device asked for
            unchanged = dtype in (None, self.dtype) and memory_format in (None, torch.preserve_format)
            return recorder.upload(self if unchanged else aten._to_copy.default(self, **kwargs))
        if device is None or device.type not in ("cpu", "meta"):
            return recorder.record(cast, (self,), kwargs)
        if device.type == "meta":
            return torch.empty_strided(self.size(), self.stride(), dtype=dtype or self.dtype, device=device)
        return aten._to_copy.default(recorder.read(self), **kwargs)

    def foreach_copy_(selves: list[torch.Tensor], sources: list[torch.Tensor], non_blocking: bool = False) -> None:
        for self, source in zip(selves, sources, strict=True):
            self.copy_(source)

    return {"copy_": copy_, "_to_copy": to_copy, "_foreach_copy_": foreach_copy_}


def _others(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    masked_fill = Operator(aten.masked_fill_.Tensor)
    index_put = Operator(aten.index_put_.default)
    batch_norm = Operator(aten.native_batch_norm.default)
    histogram = Operator(aten.histc.default)

    def local_scalar(self: torch.Tensor) -> Any:
        return recorder.read(self).item()

    def equal(self: torch.Tensor, other: torch.Tensor) -> bool:
        return torch.equal(*(recorder.read(t) if on_accelerator(t) else t for t in (self, other)))

    def triangle_indices(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def kernel(
            *args: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
        ) -> torch.Tensor:
            return recorder.upload(make(*args, dtype=dtype or torch.int64, device="cpu"), ends_segment=False)

        return kernel

    def put(
        self: torch.Tensor, indices: Any, values: torch.Tensor, accumulate: bool = False, unsafe: bool = False
    ) -> torch.Tensor:
        mask = indices[0] if len(indices) == 1 else None
        if mask is not None and mask.dtype == torch.bool and values.numel() == 1 and not accumulate:
            mask = mask.to(self.device).reshape(*mask.shape, *([1] * (self.dim() - mask.dim())))
            return recorder.record(masked_fill, (self, mask, values.reshape(()).to(self.device)), {})
        return recorder.record(index_put, (self, list(indices), values, accumulate), {})

    def histc(self: torch.Tensor, bins: int = 100, min: Any = 0, max: Any = 0) -> torch.Tensor:
        """Of integers, which a GPU takes and a CPU does not: counted by addition, in whole numbers."""
        if self.is_floating_point():
            return recorder.record(histogram, (self, bins, min, max), {})
        if min >= max:
            raise NotImplementedError(
                f"torch.histc of integers needs min < max here (got {min} and {max}){provenance.in_script()}. Give it "
                "the range of the values, or count with torch.bincount."
            )
        values = self.reshape(-1)
        inside = (values >= min) & (values <= max)
        found = ((values.long() - min) * bins).div(max - min, rounding_mode="floor").clamp(0, bins - 1)
        return torch.zeros(bins, dtype=self.dtype, device=self.device).index_add_(0, found, inside.to(self.dtype))

    def native_batch_norm(
        x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
    ) -> Any:
        """The schema of native_batch_norm hides that it updates the running statistics: write them openly. With given
        statistics it is arithmetic (torch's kernel then returns statistics of a shape that differs between devices)."""
        if not training:
            shape = [1, -1] + [1] * (x.dim() - 2)
            scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
            shift = -mean * scale if bias is None else bias - mean * scale
            nothing = torch.empty(0, dtype=mean.dtype, device=x.device)
            return (x * scale.view(shape) + shift.view(shape)).to(x.dtype), nothing, nothing
        if mean is None:
            return recorder.record(batch_norm, (x, weight, bias, mean, var, training, momentum, eps), {})
        functional = aten._native_batch_norm_legit_functional.default
        out, save_mean, save_rstd, new_mean, new_var = functional(x, weight, bias, mean, var, training, momentum, eps)
        mean.copy_(new_mean)
        var.copy_(new_var)
        return out, save_mean, save_rstd

    return {
        "_local_scalar_dense": local_scalar,
        "equal": equal,
        "histc": histc,
        "tril_indices": triangle_indices(torch.tril_indices),
        "triu_indices": triangle_indices(torch.triu_indices),
        "index_put_": put,
        "_index_put_impl_": put,  # the same, of which autograd makes use
        "native_batch_norm": native_batch_norm,
    }
