"""Floor 2: recorded operations -> StepGraph. Knows nothing of plans."""
