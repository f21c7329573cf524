"""The settings of heads, as in a drafter's config and in training configurations. Knows nothing of networks."""

from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["independent", "markov", "hydra"]
MODES = get_args(Mode)


@dataclass(frozen=True)
class HeadSettings:
    """The settings of heads, as in `config.json`. Raises ValueError for an unknown mode or sizes below 1."""

    mode: Mode = "independent"
    heads: int = 4
    blocks: int = 1  # residual blocks of each head
    rank: int = 128  # of the Markov bias
    own_heads: bool = False  # a trained LM head for each head instead of the target's

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is not a kind of heads; choose one of {', '.join(MODES)}")
        for name in ("heads", "blocks", "rank"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
