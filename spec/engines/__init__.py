"""Engines and how they are run: executors, runs made for a call, and the pool of those that are kept."""
