"""Helpers of the tests: tiny models, slow references, tapes, and runs made by hand."""
