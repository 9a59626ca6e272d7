"""The "nccl" backend of `torch.distributed`, for one process.

In: collectives of a script that was written for several GPUs and is started once. Out: what each process gives is what
it gets.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

ONE_PROCESS = (
    "The accelerator is one device, whose devices share the work by themselves: start the script once, not once a "
    "device (python script.py, torchrun --nproc-per-node 1)."
)


def install() -> None:
    """Makes "nccl" a backend. Call once."""
    if distributed.is_available():
        from torch.distributed import distributed_c10d

        backend: Any = distributed_c10d
        backend._NCCL_AVAILABLE = True
        backend.default_pg_nccl_timeout = backend.default_pg_timeout
        backend.ProcessGroupNCCL = _group_class()


def _group_class() -> type:
    """The class that "nccl" makes. Not defined before: a torch without `distributed` has no base for it."""
    base: Any = distributed.ProcessGroup

    class GroupOfOne(base):
        """Collectives of one process: results are copies of what it gives."""

        class Options:
            """Whatever a script sets here has no effect."""

            def __init__(self, is_high_priority_stream: bool = False) -> None:
                self.is_high_priority_stream = is_high_priority_stream
                self._timeout = timedelta(minutes=10)

        def __init__(self, store: Any, rank: int, size: int, options: Any = None) -> None:
            if size > 1:
                found = f"A process group of {size} processes (WORLD_SIZE={os.environ.get('WORLD_SIZE', '')})"
                raise RuntimeError(f"{found} for cuda. {ONE_PROCESS}")
            super().__init__(rank, size)

        def getBackendName(self) -> str:
            return "nccl"

        def _set_sequence_number_for_group(self) -> None:
            pass

        def allreduce(self, tensors: list[Any], opts: Any = None) -> Any:
            return _done(tensors)

        allreduce_coalesced = broadcast = reduce = allreduce

        def allgather(self, outputs: list[list[Any]], inputs: list[Any], opts: Any = None) -> Any:
            return _copied([o for group in outputs for o in group], inputs)

        def gather(self, outputs: list[list[Any]], inputs: list[Any], opts: Any = None) -> Any:
            return _copied([o for group in outputs for o in group], inputs)

        def allgather_into_tensor_coalesced(self, outputs: list[Any], inputs: list[Any], opts: Any = None) -> Any:
            return _copied(outputs, inputs)

        alltoall = reduce_scatter_tensor_coalesced = allgather_into_tensor_coalesced

        def reduce_scatter(self, outputs: list[Any], inputs: list[list[Any]], opts: Any = None) -> Any:
            return _copied(outputs, [i for group in inputs for i in group])

        scatter = reduce_scatter

        def _allgather_base(self, output: Any, input: Any, opts: Any = None) -> Any:
            return _copied([output], [input])

        _reduce_scatter_base = all_gather_single = reduce_scatter_single = _allgather_base

        def alltoall_base(self, output: Any, input: Any, output_sizes: Any, input_sizes: Any, opts: Any = None) -> Any:
            return _copied([output], [input])

        all_to_all_single = alltoall_base

        def barrier(self, opts: Any = None) -> Any:
            return _done([])

    return GroupOfOne


def _copied(outputs: list[Any], inputs: list[Any]) -> Any:
    with torch.no_grad():
        for output, input in zip(outputs, inputs, strict=True):
            output.view(input.shape).copy_(input)
    return _done(outputs)


def _done(result: Any) -> Any:
    """What a collective returns whose work is over."""
    future: Any = torch.futures.Future()
    future.set_result(result)
    work: Any = torch._C._distributed_c10d
    return work._create_work_from_future(future)
