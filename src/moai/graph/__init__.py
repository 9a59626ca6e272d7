"""Floor 1: the StepGraph type, placements, facts about operators. Knows nothing of the rooms above."""
