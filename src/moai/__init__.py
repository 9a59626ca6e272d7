"""MoAI: one virtual accelerator for plain PyTorch scripts."""

from moai.version import __version__

__all__ = ["__version__"]
