"""Measuring the devices at hand: Programs made for it, timed on the workers -> a Profile, kept in a file."""
