"""Floor 6: a person's command -> a screen. Knows nothing of tensors."""
