"""EAGLE as a drafter: a small transformer over the target's hidden states and the text, in fixed or dynamic trees.

What the network computes is in network.py, how it drafts in session.py. Knows nothing of verification or training.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ...spec.plan.trees import Rates, default_tree
from ...spec.proposal import DrafterTraits, DraftRequest
from ...spec.target.taps import feature_sizes
from ...spec.target.weights import Weights
from ..blocks import put_in_blocks
from ..folder import DrafterFolder
from ..static_tree import check_children
from .folder import load_network
from .network import EagleNetwork
from .session import EagleSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEEPEST = 6  # levels of the default tree: each costs a forward
# A rough guess at p[depth][rank], for the default tree where no acceptance has been measured.
_PRIOR = [[0.55 * 0.35**rank for rank in range(8)] for _ in range(DEEPEST)]


class EagleDrafter:
    """A network as a drafter. `rates` is the acceptance p[depth][rank] from which the default tree is planned."""

    def __init__(self, network: EagleNetwork, name: str = "eagle", rates: Rates | None = None):
        self.network, self.name = network, name
        self.traits = DrafterTraits(
            network.vocab_size, taps=tuple(network.settings.taps), follows_any_tree=True, fills_dynamic=True,
            deepest=DEEPEST, modules=(network,), vocabulary=network.vocabulary if network.trimmed else None,
            kind="eagle", catches_up=True,
        )  # fmt: skip
        self.default_shape = default_tree(rates or _PRIOR, DEEPEST, network.device.type == "cpu")

    @classmethod
    def load(cls, source: str | Path, folder: DrafterFolder | None, target: "PreTrainedModel") -> "EagleDrafter":
        """The drafter of a folder. Raises ValueError for one that is damaged."""
        assert folder is not None, "published layouts are read by `formats`"
        return cls(load_network(folder, target), Path(str(source)).name, folder.rates())

    def put_in_blocks(self, weights: Weights) -> None:
        """Round the linear layers to blocks of few bits, but for an LM head on the target's memory."""
        put_in_blocks(self.network, weights, self.network.lm_head if self.network.shares_head else None)
        self.name += f" in {weights.name}"

    def open(self, request: DraftRequest) -> EagleSession:
        network, target = self.network, request.target
        assert target is not None, "it reads the hidden states of a model"
        made_for = network.tap_sizes, network.dtype, network.device
        actual = feature_sizes(target, self.traits.taps), target.dtype, request.device
        if made_for != actual:
            raise ValueError(
                f"drafter {self.name!r} is for hidden states of {made_for[0]} numbers in {made_for[1]} on "
                f"{made_for[2]} and the target's are of {actual[0]} in {actual[1]} on {actual[2]}; load it for this "
                "target"
            )
        check_children(request.shape, len(network.vocabulary))
        return EagleSession(network, request)
