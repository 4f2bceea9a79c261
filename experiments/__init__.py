"""Rooms that use the eight files of the top level to find things out: `python -m experiments.NAME` from the root."""
