"""Numerics: every model under every plan, beside plain PyTorch on one device."""
