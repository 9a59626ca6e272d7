"""Floor 4: Program -> numbers. Knows nothing of plans and scripts."""
