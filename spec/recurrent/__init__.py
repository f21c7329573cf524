"""Layers that keep a state of the text instead of keys and values: convolutions and recurrences."""
