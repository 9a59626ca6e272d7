"""Dry runs: what a script's training step would be, without its weights and without devices. See `dry.capture`."""
