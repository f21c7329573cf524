"""The drafter from which another one goes on: `objective.start` of a configuration.

It may have been made for another target, of which this one is a fine-tune: that is what it is for. Knows no kind of
drafter in particular.
"""

from ...drafters.folder import DrafterFolder, read_folder
from ...drafters.shipped import shipped_folder
from ...spec.target.load import NAMED


def start_folder(start: str | None) -> DrafterFolder | None:
    """The drafter folder called `start`, by path, hub id or the name of one that ships; None for no start, and for an
    ordinary model."""
    if start is None or start in NAMED:
        return None
    return read_folder(shipped_folder(start) or start)
