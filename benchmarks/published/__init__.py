"""Predictions against training speeds that others published: `python -m benchmarks.published --csv FILE`."""
