"""The command line, `paceline`."""

from .main import main

__all__ = ["main"]
