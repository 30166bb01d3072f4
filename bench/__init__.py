"""Measurements: how good and how fast, with the machine that gave the figures."""
