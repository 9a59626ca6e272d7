"""Choosing a plan for a captured step: what the session and `moai plan` have in common."""
