"""`import moreh`: how portable scripts ask whether the platform is there. The same module as `torch.moreh`."""

from moreh import option

__all__ = ["option"]
