"""The `torch.backends` entry point: called at the end of `import torch`."""


def activate() -> None:
    """Make the accelerator known to torch."""
