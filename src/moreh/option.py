"""`torch.moreh.option`: what a script may say about how it is run."""

from __future__ import annotations

from typing import Literal


def enable_advanced_parallelization(
    pipeline_parallel: bool = True,
    num_stages: int | Literal["auto"] = "auto",
    num_micro_batches: int | Literal["auto"] = "auto",
    activation_recomputation: bool | Literal["auto"] = "auto",
    distribute_parameter: bool | Literal["auto"] = "auto",
    mixed_precision: bool = True,
) -> None:
    """Runs what follows on the accelerator, spread over its devices in the fastest way that fits.

    Each argument that is not 'auto' restricts the choice:

    pipeline_parallel: whether the model may be cut into stages.
    num_stages: the largest number of stages, 1 or more.
    num_micro_batches: the number of parts that a batch is cut into, 1 or more.
    activation_recomputation: whether activations are computed again in the backward pass instead of kept.
    distribute_parameter: whether parameters and gradients are spread over the devices.
    mixed_precision: whether matrix products are computed in bfloat16.

    Raises TypeError or ValueError for an argument that is none of these.
    """
    from moai.device import alias, options
    from moai.plan.options import Options

    options.enable(
        Options(
            pipeline_parallel=pipeline_parallel,
            num_stages=num_stages,
            num_micro_batches=num_micro_batches,
            activation_recomputation=activation_recomputation,
            distribute_parameter=distribute_parameter,
            mixed_precision=mixed_precision,
        )
    )
    alias.turn_on()
