"""Measuring methods on prompts, and what a run file says: figures, intervals, the page."""
