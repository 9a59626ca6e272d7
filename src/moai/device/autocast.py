"""Autocast on the accelerator: `torch.autocast("cuda")` and the casts it makes.

In: the switches that torch keeps for each device type, asked for by the name "cuda". Out: the accelerator's switches,
and kernels that cast the operands of the operators below by CUDA's rules. The lists are those of
ATen/autocast_mode.h, which is what CUDA uses; any operator that is not in a list runs in the type of its operands.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from moai.device.torch_device import NAME

LOWER_PRECISION = (
    *("_convolution.deprecated", "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d"),
    *("conv_transpose2d.input", "conv_transpose3d.input", "convolution", "prelu", "addmm", "addmv", "addr", "matmul"),
    *("einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot"),
    *("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    *("_scaled_dot_product_flash_attention", "scaled_dot_product_attention"),
)
FP32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh"),
    *("tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm"),
    *("rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity"),
    *("poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div"),
    *("l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss"),
    *("soft_margin_loss", "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "dist"),
    *("pdist", "cdist", "renorm", "logsumexp", "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d"),
    *("_upsample_nearest_exact2d", "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_linear1d"),
    *("upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_trilinear3d", "upsample_bicubic2d"),
    "_upsample_bicubic2d_aa",
)
FP32_RESULT = (  # where the caller names no dtype
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm"),
    *("linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList"),
)
FP32_APPENDED = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
WIDEST = (
    *("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot"),
    "scatter_add",
)
UNSAFE = ("binary_cross_entropy",)

Kernel = Callable[..., Any]

_libraries: list[torch.library.Library] = []
# Casts of parameters, kept until the outermost autocast ends: one cast a step, however often a parameter is used.
_casts: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}


def rename() -> None:
    """Makes torch's switches for "cuda" those of the accelerator. Call once; costs nothing."""

    def named(device_type: Any) -> Any:
        return NAME if device_type == "cuda" else device_type

    is_enabled, get_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    set_enabled, set_dtype = torch.set_autocast_enabled, torch.set_autocast_dtype
    clear = torch.clear_autocast_cache

    def set_autocast_enabled(*args: Any) -> None:
        device_type, enabled = args if len(args) == 2 else ("cuda", args[0])
        set_enabled(named(device_type), enabled)

    def clear_autocast_cache() -> None:
        _casts.clear()
        clear()

    replacements = {
        "is_autocast_enabled": lambda device_type="cuda": is_enabled(named(device_type)),
        "get_autocast_dtype": lambda device_type: get_dtype(named(device_type)),
        "set_autocast_enabled": set_autocast_enabled,
        "set_autocast_dtype": lambda device_type, dtype: set_dtype(named(device_type), dtype),
        "get_autocast_gpu_dtype": lambda: get_dtype(NAME),
        "set_autocast_gpu_dtype": lambda dtype: set_dtype(NAME, dtype),
        "clear_autocast_cache": clear_autocast_cache,
    }
    for name, replacement in replacements.items():
        setattr(torch, name, replacement)


def install() -> None:
    """Registers the casting kernels. Call once, when the device is used for the first time."""
    aten = torch.library.Library("aten", "IMPL")
    others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    _libraries.extend((aten, others))
    others.fallback(torch.library.fallthrough_kernel)
    for makers, names in (
        (_in_lower_precision, LOWER_PRECISION),
        (_in_fp32, FP32),
        (_with_fp32_result, FP32_RESULT),
        (_in_widest, WIDEST),
        (_refused, UNSAFE),
    ):
        for name in names:
            aten.impl(name, makers(_operator(name)), "AutocastPrivateUse1")
    for name, with_dtype in FP32_APPENDED.items():
        aten.impl(name, _with_fp32_appended(_operator(name), _operator(with_dtype)), "AutocastPrivateUse1")


def _operator(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _below_autocast() -> Any:
    key: Any = torch._C._parse_dispatch_key("AutocastPrivateUse1")
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


def _in_lower_precision(operator: torch._ops.OpOverload) -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            return _call_in(torch.get_autocast_dtype(NAME), operator, args, kwargs)

    return kernel


def _in_fp32(operator: torch._ops.OpOverload) -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            return _call_in(torch.float32, operator, args, kwargs)

    return kernel


def _with_fp32_result(operator: torch._ops.OpOverload) -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            if _is_eligible(args[0]) and kwargs.get("dtype") is None:
                kwargs["dtype"] = torch.float32
            return operator(*args, **kwargs)

    # `dtype` is an ordinary argument of some of these operators
    position = next(i for i, argument in enumerate(operator._schema.arguments) if argument.name == "dtype")

    def by_keyword(*args: Any, **kwargs: Any) -> Any:
        if len(args) > position:
            kwargs["dtype"] = args[position]
        return kernel(*args[:position], **kwargs)

    return kernel if operator._schema.arguments[position].kwarg_only else by_keyword


def _with_fp32_appended(operator: torch._ops.OpOverload, with_dtype: torch._ops.OpOverload) -> Kernel:
    def kernel(*args: Any) -> Any:
        with _below_autocast():
            if not _is_eligible(args[0]):
                return operator(*args)
            defaults = [argument.default_value for argument in operator._schema.arguments[len(args) :]]
            return with_dtype(*args, *defaults, dtype=torch.float32)

    return kernel


def _in_widest(operator: torch._ops.OpOverload) -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            return _call_in(_widest((*args, *kwargs.values())), operator, args, kwargs)

    return kernel


def _refused(operator: torch._ops.OpOverload) -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast. Use "
            "binary_cross_entropy_with_logits or torch.nn.BCEWithLogitsLoss, which take the values before the sigmoid."
        )

    return kernel


def _call_in(dtype: torch.dtype, operator: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return operator(
        *(_cast(arg, dtype) for arg in args),
        **{name: _cast(arg, dtype) for name, arg in kwargs.items()},
    )


def _is_eligible(arg: Any) -> bool:
    """Whether autocast may change the type of `arg`: a floating-point tensor of the accelerator, but not fp64."""
    return isinstance(arg, torch.Tensor) and arg.is_floating_point() and arg.dtype != torch.float64 and arg.is_cuda


def _widest(args: Iterable[Any]) -> torch.dtype:
    """fp32 if any of the tensors is, else autocast's type. Raises RuntimeError for a third type among them."""
    lower = torch.get_autocast_dtype(NAME)
    flat = (item for arg in args for item in (arg if isinstance(arg, list | tuple) else (arg,)))
    dtypes = {item.dtype for item in flat if _is_eligible(item)}
    if torch.float32 in dtypes:
        return torch.float32
    if dtypes - {lower}:
        names = ", ".join(sorted(map(str, dtypes)))
        raise RuntimeError(f"Autocast to {lower} cannot promote operands of {names}. Cast them to one type first.")
    return lower


def _cast(arg: Any, dtype: torch.dtype) -> Any:
    if isinstance(arg, list | tuple):
        return [_cast(item, dtype) for item in arg]
    if not _is_eligible(arg) or arg.dtype == dtype:
        return arg
    keep = (
        arg.dtype == torch.float32
        and dtype == torch.get_autocast_dtype(NAME)
        and arg.requires_grad
        and arg.is_leaf
        and not arg._is_view()
        and torch.is_autocast_cache_enabled()
        and torch.is_grad_enabled()  # a cast without a gradient must not be found by code that needs one
    )
    if not keep:
        return arg.to(dtype)
    known = _casts.get(id(arg))
    if known is not None and known[0]() is arg:
        return known[1]
    cast = arg.to(dtype)
    _casts[id(arg)] = (weakref.ref(arg), cast)
    return cast
