"""What is timed: products, attention, operators and messages of given sizes, as Cases.

In: sizes. Out: Cases, and the sizes as `lower.tasks` would count them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moai.graph.step_graph import Ref, map_args
from moai.lower.program import Instruction
from moai.profiling.stopwatch import Case, calls

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WIDTH = 512  # of the rows that operators work on
_HEAD = 64
_BEFORE = 256  # length of the matrices that devices multiply before a message
_F32 = torch.float32

# value ids of results; inputs have the first ones
_A, _B, _C, _D = range(100, 104)
_MOST_IDS = 110


def call(op: str, *args: Any, outs: Any = None, **kwargs: Any) -> Instruction:
    """An instruction of the operator `op`, without "aten." and ".default"."""
    name = op if op.startswith("moai.") else f"aten.{op}"
    return Instruction(name if name.count(".") == 2 else f"{name}.default", args, kwargs, outs)


def matmul(m: int, n: int, k: int, precision: str) -> Case:
    """The three products of a layer: forward (x W^T), and backward to what came in (g W) and to the weights (x^T g),
    each of the lengths m, n and k. Which of them a product is, a Task does not say."""
    dtype = DTYPES[precision]
    tensors = tuple(_random(a, b).to(dtype) for a, b in ((m, k), (k, n), (n, k), (k, m)))
    body = calls(
        4,
        call("mm", Ref(0), Ref(1), outs=_A),
        call("t", Ref(2), outs=_B),
        call("mm", Ref(0), Ref(_B), outs=_C),
        call("t", Ref(3), outs=_D),
        call("mm", Ref(_D), Ref(1), outs=_D + 1),
    )
    return Case(tensors, body, parts=3)


def attention(sequence: int, rows: int, precision: str, backward: bool) -> Case:
    """Causal attention, `rows` queries in all, in sequences of `sequence`."""
    heads = max(1, rows // sequence)
    shape = (1, heads, sequence, _HEAD)
    options = (None, True, None, False)
    grad, q, k, v, out = (_random(*shape).to(DTYPES[precision]) for _ in range(5))
    if not backward:
        forward = call("moai.sdpa", Ref(0), Ref(1), Ref(2), *options, outs=(_A, _B))
        return Case((q, k, v), calls(3, forward))
    given = (grad, q, k, v, out, _random(*shape[:3]))
    refs = [Ref(i) for i in range(len(given))]
    return Case(given, calls(6, call("moai.sdpa_backward", *refs, *options, outs=(_A, _B, _C))))


def attention_size(sequence: int, rows: int, precision: str, backward: bool) -> tuple[float, float]:
    """Flops and bytes of such a case."""
    rows = max(1, rows // sequence) * sequence
    flops = 2.0 * rows * sequence * _HEAD  # half of all scores, as the mask leaves them
    tensor, sums = rows * _HEAD * DTYPES[precision].itemsize, rows * _F32.itemsize
    return (2.5 * flops, 8.0 * tensor + sums) if backward else (flops, 4.0 * tensor + sums)


@dataclass(frozen=True, slots=True)
class _Operator:
    """`tensors`: how many tensors of [rows, width] in fp32 it reads and writes; `case` of so many rows."""

    tensors: float
    case: Callable[[int], Case]


def operator(name: str, nbytes: float) -> Case:
    """The operator `name` of `work.OPERATORS`, moving about `nbytes` bytes."""
    known = _OPERATORS[name]
    return known.case(max(1, round(nbytes / (known.tensors * _WIDTH * _F32.itemsize))))


def in_turn(case: Case, times: int) -> Case:
    """`case` on so many sets of tensors, one after another, whose results are all kept to the end. In a step, too, an
    operator meets what was not used just now, and writes where nothing was written just now."""
    n = len(case.tensors)
    tensors = tuple(x.clone() for _ in range(times) for x in case.tensors)
    body = [_moved(each, n, turn, times) for turn in range(times) for each in case.body]
    return Case(tensors, calls(times * n, *body), case.axes, times)


def _moved(instruction: Instruction, n: int, turn: int, times: int) -> Instruction:
    """The instruction on set `turn` of the `times` that there are of `n` tensors."""

    def here(i: int) -> int:
        return turn * n + i if i < n else times * n + turn * _MOST_IDS + i

    def moved(leaf: Any) -> Any:
        return Ref(here(leaf.id)) if isinstance(leaf, Ref) else leaf

    args, kwargs = map_args(instruction.args, moved), map_args(instruction.kwargs, moved)
    made = instruction.outs
    outs = tuple(map(here, made)) if isinstance(made, tuple) else None if made is None else here(made)
    return Instruction(instruction.op, args, kwargs, outs)


def nothing_much() -> Case:
    """One small operator, whose time is that of its call."""
    return _simple("add.Tensor", 2)(1)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cpu")


def _simple(op: str, inputs: int, *args: Any, **kwargs: Any) -> Callable[[int], Case]:
    """An operator of `inputs` tensors, further arguments, and one result."""

    def case(rows: int) -> Case:
        tensors = tuple(_random(rows, _WIDTH).abs_() for _ in range(inputs))
        refs = [Ref(i) for i in range(inputs)]
        return Case(tensors, calls(inputs, call(op, *refs, *args, outs=_A, **kwargs)))

    return case


def _where(rows: int) -> Case:
    x, y = _random(rows, _WIDTH), _random(rows, _WIDTH)
    return Case((x > 0, x, y), calls(3, call("where.self", Ref(0), Ref(1), Ref(2), outs=_A)))


def _clone(rows: int) -> Case:
    """Heads before positions, as attention wants them."""
    swap = call("transpose.int", Ref(0), 0, 1, outs=_A)
    copy = call("clone", Ref(_A), outs=_B, memory_format=torch.contiguous_format)
    return Case((_random(rows, _WIDTH // _HEAD, _HEAD),), calls(1, swap, copy))


def _cat(rows: int) -> Case:
    return Case((_random(rows, _WIDTH),) * 2, calls(2, call("cat", (Ref(0), Ref(1)), 0, outs=_A)))


def _embedding(rows: int) -> Case:
    places = torch.randint(0, rows, (rows,), device="cpu")
    return Case((_random(rows, _WIDTH), places), calls(2, call("embedding", Ref(0), Ref(1), outs=_A)))


def _embedding_backward(rows: int) -> Case:
    places = torch.randint(0, rows, (rows,), device="cpu")
    back = call("embedding_dense_backward", Ref(0), Ref(1), rows, -1, False, outs=_A)
    return Case((_random(rows, _WIDTH), places), calls(2, back))


def _layer_norm(rows: int) -> Case:
    tensors = (_random(rows, _WIDTH), _random(_WIDTH), _random(_WIDTH))
    norm = call("native_layer_norm", Ref(0), (_WIDTH,), Ref(1), Ref(2), 1e-5, outs=(_A, _B, _C))
    return Case(tensors, calls(3, norm))


def _layer_norm_backward(rows: int) -> Case:
    shapes = ((rows, _WIDTH), (rows, _WIDTH), (rows, 1), (rows, 1), (_WIDTH,), (_WIDTH,))
    grad, x, mean, rstd, weight, bias = (Ref(i) for i in range(6))
    wanted = (True, True, True)
    args = (grad, x, (_WIDTH,), mean, rstd, weight, bias, wanted)
    back = call("native_layer_norm_backward", *args, outs=(_A, _B, _C))
    return Case(tuple(_random(*shape) for shape in shapes), calls(6, back))


def _adamw(rows: int) -> Case:
    tensors = (*(_random(rows, _WIDTH).abs_() for _ in range(4)), torch.ones((), device="cpu"))
    parameter, grad, mean, square, step = ((Ref(i),) for i in range(5))
    options = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}
    update = call("_fused_adamw_", parameter, grad, mean, square, (), step, amsgrad=False, maximize=False, **options)
    return Case(tensors, calls(5, update))


def _dropout_backward(rows: int) -> Case:
    grad, mask = _random(rows, _WIDTH), _random(rows, _WIDTH) > 0
    return Case((grad, mask), calls(2, call("native_dropout_backward", Ref(0), Ref(1), 1.25, outs=_A)))


def _random_numbers(rows: int) -> Case:
    """A dropout's mask."""
    size = (rows, _WIDTH * _F32.itemsize)
    return Case((), calls(0, call("moai.random", size, "bernoulli", 0.9, 0.0, 0, 0, torch.bool, outs=_A)))


_OPERATORS: Mapping[str, _Operator] = {
    "add": _Operator(3, _simple("add.Tensor", 2)),
    "mul": _Operator(3, _simple("mul.Tensor", 2)),
    "div": _Operator(3, _simple("div.Tensor", 2)),
    "pow": _Operator(2, _simple("pow.Tensor_Scalar", 1, 2)),
    "exp": _Operator(2, _simple("exp", 1)),
    "rsqrt": _Operator(2, _simple("rsqrt", 1)),
    "tanh": _Operator(2, _simple("tanh", 1)),
    "gelu": _Operator(2, _simple("gelu", 1)),
    "gelu_backward": _Operator(3, _simple("gelu_backward", 2)),
    "silu": _Operator(2, _simple("silu", 1)),
    "silu_backward": _Operator(3, _simple("silu_backward", 2)),
    "sum": _Operator(1, _simple("sum.dim_IntList", 1, (0,))),
    "mean": _Operator(1, _simple("mean.dim", 1, (-1,), True)),
    "where": _Operator(3.25, _where),
    "clone": _Operator(2, _clone),
    "_to_copy": _Operator(1.5, _simple("_to_copy", 1, dtype=torch.bfloat16)),
    "cat": _Operator(4, _cat),
    "embedding": _Operator(2, _embedding),
    "embedding_dense_backward": _Operator(2, _embedding_backward),
    "native_layer_norm": _Operator(2, _layer_norm),
    "native_layer_norm_backward": _Operator(3, _layer_norm_backward),
    "_softmax": _Operator(2, _simple("_softmax", 1, -1, False)),
    "_softmax_backward_data": _Operator(3, _simple("_softmax_backward_data", 2, -1, _F32)),
    "_log_softmax": _Operator(2, _simple("_log_softmax", 1, -1, False)),
    "_log_softmax_backward_data": _Operator(3, _simple("_log_softmax_backward_data", 2, -1, _F32)),
    "_fused_adamw": _Operator(7, _adamw),
    "_safe_softmax": _Operator(2, _simple("_safe_softmax", 1, -1)),
    "tanh_backward": _Operator(3, _simple("tanh_backward", 2)),
    "native_dropout_backward": _Operator(2.25, _dropout_backward),
    "random": _Operator(1, _random_numbers),
}


# Messages: within groups of `size` devices side by side, all groups at once.


def message(kind: str, mode: str, nbytes: float, size: int, n_devices: int) -> Case:
    """A message of `nbytes` in all. "started": as those beside which a device computes are done."""
    if mode == "waited":
        return _waited(kind, nbytes, size, n_devices)
    length = max(size, int(nbytes) // _F32.itemsize // size * size)
    part = (0, (length // size,) * size, 1)
    over = ("tp",)
    body: tuple[Instruction, ...]
    if kind == "all_reduce":
        body = _started(Instruction("all_reduce_start", ((Ref(0),), over), {"in_place": True}, _A), ())
    else:
        body = _started(Instruction(f"{kind}_start", ((Ref(0),), over, (part,)), {}, _A), (_B,))
    given = length // size if kind == "all_gather" else length
    return Case((torch.zeros(given, device="cpu"),), body, (("dp", n_devices // size), ("tp", size)))


def _waited(kind: str, nbytes: float, size: int, n_devices: int) -> Case:
    """The devices compute before, as they do in a step: they never come at the very same time."""
    length = max(size, int(nbytes) // _F32.itemsize // size * size)
    how = ("sum",) if kind == "all_reduce" else (0, (length // size,) * size, 1)
    given = length // size if kind == "all_gather" else length
    xs = (_random(_BEFORE, _BEFORE), torch.zeros(given, device="cpu"))
    computed = call("mm", Ref(0), Ref(0), outs=_B)
    body = calls(2, computed, Instruction(kind, (Ref(1), ("tp",), *how), {}, _A))
    return Case(xs, body, (("dp", n_devices // size), ("tp", size)), beside=Case(xs, calls(2, computed)))


def beside(nbytes: float, products: int, length: int, n_devices: int) -> Case:
    """A message among all devices (none of 0 bytes), and products of matrices of `length` that are computed before it
    is waited for."""
    xs = (_random(length, length), torch.zeros(max(1, int(nbytes) // _F32.itemsize), device="cpu"))
    computed = [call("mm", Ref(0), Ref(0), outs=_D + i) for i in range(products)]
    if not nbytes:
        return Case(xs, calls(2, *computed))
    start = Instruction("all_reduce_start", ((Ref(1),), ("dp",)), {"in_place": True}, _A)
    return Case(xs, calls(2, start, *computed, Instruction("wait", (Ref(_A),), {}, ())), (("dp", n_devices),))


def _started(start: Instruction, results: tuple[int, ...]) -> tuple[Instruction, ...]:
    return calls(1, start, Instruction("wait", (Ref(_A),), {}, results))
