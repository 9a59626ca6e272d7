"""Floor 3: StepGraph + Plan -> Program. Knows nothing of scripts and sockets."""
