"""Compiled regions: when a program's regions are compiled, and what stands for them then.

In: a program, and the tensors that its regions meet in a run. Out: functions that stand for regions. A kernel that has
a rival is a region of its own (`rivals`).

A program starts as it is. Compiling begins, in the background, once compiled code would have saved by now what it
costs: a program that has run for so long will probably run for as long again. MOAI_COMPILE=always compiles before the
third run, and waits for it; MOAI_COMPILE=never does not compile. Ranks need not agree on the run from which they use
compiled code: a region exchanges nothing with others, and gives the plain numbers but for rounding.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from moai.graph.step_graph import flat_ids
from moai.lower.again import computing_again
from moai.lower.program import Instruction, Program
from moai.lower.regions import Region, region_of, regions
from moai.runtime.codegen import Call
from moai.runtime.inductor import Body, Compiler, Function, Job
from moai.runtime.layout import Layout
from moai.runtime.rivals import rival

Policy = Literal["always", "never", "auto"]

# The share of a step that compiled regions save at least, where they save anything.
_GAIN = 0.03
# The longest wait where the user wants compiled code at once.
_WAIT_SECONDS = 600.0
# Compared are all entries of a small tensor, and one in so many of a larger one: a prime, which no row's length shares.
_FEW, _STRIDE = 1 << 14, 61


def policy(environ: Mapping[str, str]) -> Policy:
    """MOAI_COMPILE; ValueError for what it cannot be."""
    match environ.get("MOAI_COMPILE") or "auto":
        case "always" | "never" | "auto" as found:
            return found
        case other:
            raise ValueError(f"MOAI_COMPILE is {other!r}: it can be always, never or auto")


class CompiledRegion:
    """What stands for a region. Called with a list of its inputs, which it empties.

    Where tensors lie otherwise than the code was compiled for, and where there is no such code, the operators run. So
    they do at the first call, and ever after if the compiled code gives other numbers then.
    """

    def __init__(self, body: Body, layouts: Sequence[Layout], function: Function | None, compiler: Compiler) -> None:
        self._body = body
        self._strides = [x.stride for x in layouts]
        self._rounding = body.rounding(layouts)
        self._function = function
        self._compiler = compiler
        self._tried = False

    def __call__(self, inputs: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        function = self._function
        if function is None or [x.stride() for x in inputs] != self._strides:
            outputs: Sequence[torch.Tensor] = self._body(inputs)
        elif self._tried:
            outputs = function(inputs)
        else:
            outputs = self._try(function, inputs)
        inputs.clear()
        return outputs

    def _try(self, function: Function, inputs: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        body = self._body
        names = body.region.inputs
        copies = [x.clone() if i in body.overwritten else x for i, x in zip(names, inputs, strict=True)]
        compiled = function(list(copies))
        apart = _share_no_memory([*compiled, *copies], len(compiled))
        kept = [at for at, i in enumerate(names) if i in body.kept]
        found = [_sample(x) for x in (*compiled, *(copies[at] for at in kept))]
        del compiled, copies  # results may be large, and are there only once
        plain = body(inputs)
        expected = [_sample(x) for x in (*plain, *(inputs[at] for at in kept))]
        if not apart or not all(_close(a, b, self._rounding) for a, b in zip(found, expected, strict=True)):
            self._compiler.complain("Compiled code gave other numbers than the operators that it stands for")
            self._function = None
        self._tried = True
        return plain


def _sample(x: torch.Tensor) -> torch.Tensor:
    """A copy of some entries, for comparing: from all columns of a large tensor, whatever their number is."""
    return x.flatten()[:: _STRIDE if x.numel() > _FEW else 1].clone()


def _share_no_memory(tensors: Sequence[torch.Tensor], n: int) -> bool:
    """Whether each of the first `n` has memory of its own."""
    counts = Counter(_address(x) for x in tensors if x.numel())
    return all(counts[_address(x)] <= 1 for x in tensors[:n])


def _close(a: torch.Tensor, b: torch.Tensor, rounding: float) -> bool:
    """Whether `a` is `b` but for `rounding`, measured by the largest entry. What is not a float has to be equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not b.dtype.is_floating_point or not b.numel():
        return torch.equal(a, b)
    usual = b.isfinite()
    if not torch.equal(usual, a.isfinite()):
        return False
    error, size = ((a - b).where(usual, 0.0).abs().max(), b.where(usual, 0.0).abs().max())
    return bool(error <= size * max(rounding, torch.finfo(b.dtype).eps) ** 0.5)


def _address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class ProgramRegions:
    """The regions of one program on one device."""

    def __init__(
        self, program: Program, calls: Sequence[Call | None], compiler: Compiler, wanted: Policy = "auto"
    ) -> None:
        self._compiler = compiler
        self._wanted = wanted
        self._bodies: dict[int, Body] = {}  # by the index of the first instruction, as all below
        self._jobs: dict[int, Job] = {}
        self._runs = 0
        self._seconds = 0.0
        self._submitted = self._taken = False
        if wanted != "never":
            code = program.instructions
            for region in (*computing_again(program, regions(program)), *_rivalled(code)):
                own = [call for call in region.of(calls) if call is not None]
                self._bodies[region.start] = Body(region, region.of(code), own)

    @property
    def watching(self) -> bool:
        """Whether `meet` is to be called before every instruction of the coming run. It is the second one: from then on
        tensors lie as they always will."""
        return self._runs == 1 and bool(self._bodies)

    def meet(self, index: int, values: Mapping[int, Any]) -> None:
        """Instruction `index` comes next; `values` are there."""
        body = self._bodies.get(index)
        if body is None:
            return
        inputs = [values[i] for i in body.region.inputs]
        if body.rival.takes(inputs) if body.rival else _written_apart(body, inputs):
            self._jobs[index] = self._compiler.job(body, tuple(map(Layout.of, inputs)))

    def ran(self, seconds: float) -> None:
        """A run took `seconds`. Has the regions compiled if it is time to."""
        self._runs += 1
        self._seconds += seconds
        if self._submitted or not self._jobs:
            return
        jobs = list(self._jobs.values())
        if self._wanted == "always" or self._seconds * _GAIN > self._compiler.cost(jobs):
            self._submitted = True
            self._compiler.submit(jobs)
        if self._wanted == "always" and not _wait(jobs):
            self._compiler.complain(f"Compiling a step took more than {_WAIT_SECONDS:.0f} s")

    def take(self) -> dict[int, tuple[Region, CompiledRegion]]:
        """What stands for the regions: once, when all are compiled."""
        if self._taken or not self._submitted or not all(job.done.is_set() for job in self._jobs.values()):
            return {}
        self._taken = True
        found = {}
        for index, body in self._bodies.items():
            job = self._jobs.get(index)
            function = job.function if job else None
            # A region stands for its instructions even if it is not compiled: others count on what it does again.
            if function or not body.rival:
                layouts = job.layouts if job else ()
                found[index] = (body.region, CompiledRegion(body, layouts, function, self._compiler))
        return found


def _rivalled(code: Sequence[Instruction]) -> Iterator[Region]:
    """Each kernel that has a rival as a region of its own."""
    return (region_of(code, at, at + 1, tuple(flat_ids(i.outs))) for at, i in enumerate(code) if rival(i))


def _written_apart(body: Body, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether what is written in place is no other input's memory: compiled code may write before it is read."""
    counts = Counter(map(_address, inputs))
    return all(
        counts[_address(x)] == 1 for i, x in zip(body.region.inputs, inputs, strict=True) if i in body.overwritten
    )


def _wait(jobs: Sequence[Job]) -> bool:
    """Wait until `jobs` are done; False if that takes too long."""
    until = time.monotonic() + _WAIT_SECONDS
    return all(job.done.wait(max(0.0, until - time.monotonic())) for job in jobs)
