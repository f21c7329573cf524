"""Targets whose weights are not in memory: repacked once into files, and fetched layer by layer during a forward."""
