"""Measurements: how good and how fast, with the machine and the command that gave the figures."""
