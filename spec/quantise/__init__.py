"""Quantising a target with calibration, and the folder that holds the result."""
