"""Drafters in the formats that others publish and serve: read, and written.

`published` finds out whether a folder or hub id holds one, by the names of its tensors.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..kinds import KINDS
from .checkpoint import Checkpoint, fetched, open_checkpoints
from .detect import UNREAD, detect

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...spec.proposal import Drafter
    from ..eagle.settings import EagleSettings


class Published:
    """A published drafter that can be loaded for a target. It is tried on the target's own text once."""

    def __init__(self, form: str, checkpoint: Checkpoint, target: "PreTrainedModel"):
        self.form, self.checkpoint, self.target = form, checkpoint, target
        self.name = Path(checkpoint.name).name
        self.tried = False
        self.settings: EagleSettings | None = None  # that an EAGLE head was found to have

    def load(self) -> "Drafter":
        """The drafter. Raises ValueError, in one sentence, for a damaged file and for one made for another target."""
        from .medusa import load_heads
        from .mlp_speculator import MlpSpeculatorDrafter, load_speculator
        from .probe import check_heads

        if self.form == "EAGLE":
            return self._eagle()
        medusa = self.form == "Medusa"
        heads = load_heads(self.checkpoint, self.target) if medusa else load_speculator(self.checkpoint, self.target)
        if not self.tried:
            check_heads(heads, self.checkpoint, self.target)
            self.tried = True
        make: Any = KINDS["medusa"].drafter_class() if medusa else MlpSpeculatorDrafter
        return make(heads, self.name)

    def _eagle(self) -> "Drafter":
        from .eagle import EagleFile
        from .probe import choose

        file = EagleFile(self.checkpoint, self.target)
        network, conventions = file.network()
        if self.settings is None:
            self.settings = choose(network, conventions, file.config, self.target)
        network.adopt(self.settings)
        make: Any = KINDS["eagle"].drafter_class()
        return make(network, self.name)


def published(name_or_path: str | Path, target: "PreTrainedModel") -> Published | None:
    """The published drafter in a folder or of a hub id; None for an ordinary model. It is fetched, and not yet loaded.

    Heads that lie beside an ordinary model are for it, so they are meant where it is as wide as the target, as with
    Medusa-2; else the model is, as a draft model. Raises ValueError, in one sentence, for pickles, damaged files, and
    formats that are known and not read."""
    if Path(name_or_path).suffix.lower() == ".gguf":
        return None
    of_target = str(name_or_path) == str(getattr(target.config, "_name_or_path", ""))
    width = target.config.get_text_config().hidden_size
    drafts = False  # whether there is a draft model, whatever lies beside it
    for checkpoint in open_checkpoints(name_or_path):
        config = checkpoint.config()
        form = detect(config, checkpoint.files, of_target)
        if form in UNREAD:
            if of_target or not drafts:
                raise ValueError(
                    f"drafter {name_or_path} has the format {form}, {UNREAD[form]}, which is not read yet; take an "
                    "EAGLE-3 head or a draft model for this target, or ngram"
                )
        elif form is not None and (not drafts or config.get("hidden_size") == width):
            return Published(form, fetched(checkpoint), target)
        drafts |= checkpoint.saved
    return None
