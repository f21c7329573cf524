"""Where things are kept on this machine: the cache folder."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$PACELINE_CACHE`, or `paceline` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PACELINE_CACHE") or Path(base) / "paceline")
