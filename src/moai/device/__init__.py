"""Floor 3: what the script calls -> recorded operations. Knows nothing of plans and workers."""
