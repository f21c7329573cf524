"""A small causal LM as drafter: one forward per tree level, a slot cache of its own.

Its cache follows the accepted path; only the last accepted token can be missing from it (a leaf is never
forwarded), so each step starts with the last two committed tokens. Knows nothing of verification.
"""

import copy
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..spec.attach import attach
from ..spec.planner import Rates, default_tree
from ..spec.proposal import DrafterTraits, DraftRequest, DraftSession, Proposal
from ..spec.slots import SlotModel
from ..spec.state import DecodeState
from ..spec.target import Span
from ..spec.tree import DynamicShape, TreeShape
from .complete import complete
from .folder import DrafterFolder
from .known_tokens import WidenedHead, read_known, trimmed_head
from .static_tree import StaticTree, check_children

DEEPEST = 4  # levels of the default tree: each costs a forward


class ModelDrafter:
    """`model` is any causal LM with the target's vocabulary that passes the same self-test as a target. `rates` is
    the acceptance p[depth][rank] that the default tree is planned from, a chain where there is none. With
    `vocabulary` (V',), ascending ids, it drafts these tokens only, and its LM head is replaced by one that gives
    their logits."""

    def __init__(
        self,
        model: PreTrainedModel,
        name: str = "draft model",
        rates: Rates | None = None,
        vocabulary: Tensor | None = None,
    ):
        attach(model)
        self.model = model
        self.vocabulary = None if vocabulary is None else vocabulary.to(model.device)
        if self.vocabulary is not None:
            model.set_output_embeddings(trimmed_head(model.get_output_embeddings(), self.vocabulary))
        self.name = name
        on_cpu = model.device.type == "cpu"
        self.default_shape = default_tree(rates, DEEPEST, on_cpu) if rates else TreeShape.chain(DEEPEST)
        self.traits = DrafterTraits(
            model.config.get_text_config().vocab_size, fills_dynamic=True, deepest=DEEPEST, modules=(model,),
            vocabulary=self.vocabulary, causal_lm=self._whole_model(), kind="draft_lm",
        )  # fmt: skip

    @classmethod
    def load(cls, source: str | Path, folder: DrafterFolder | None, target: PreTrainedModel) -> "ModelDrafter":
        """The draft model of a folder, a hub id or a short name; `folder` where it was trained here.

        Raises ValueError where it cannot be loaded or has another vocabulary than `target`."""
        rates = known = None
        if folder is not None:
            vocab = target.config.get_text_config().vocab_size
            rates, known = folder.rates(), read_known(folder.path, folder.config.get("known_tokens"), vocab)
        drafter = cls(complete(source, target), Path(str(source)).name, rates, known)
        drafter.check_vocabulary(target)
        return drafter

    @classmethod
    def around(cls, model: PreTrainedModel) -> "ModelDrafter":
        """The drafter of a loaded model, which is kept with the model, so that what is made for it serves again."""
        drafter = model.__dict__.get("_paceline_drafter")
        vocab = model.config.get_text_config().vocab_size
        if drafter is None or drafter.model is not model or drafter.traits.vocab_size != vocab:
            name = Path(str(getattr(model.config, "_name_or_path", "") or type(model).__name__)).name
            drafter = model.__dict__["_paceline_drafter"] = cls(model, name)
        attach(model)  # which may have changed
        return drafter

    def _whole_model(self) -> PreTrainedModel:
        """The draft as an ordinary causal LM with logits of the whole vocabulary, on the same weights."""
        if self.vocabulary is None:
            return self.model
        whole = copy.copy(self.model)
        whole._modules = dict(whole._modules)  # so that its head can be another one
        vocab_size = self.model.config.get_text_config().vocab_size
        whole.set_output_embeddings(WidenedHead(self.model.get_output_embeddings(), self.vocabulary, vocab_size))
        return whole

    def check_vocabulary(self, target: PreTrainedModel) -> None:
        """Raise ValueError unless the draft's vocabulary is as large as the target's."""
        vocab = target.config.get_text_config().vocab_size
        if self.traits.vocab_size != vocab:
            raise ValueError(
                f"drafter {self.name} has a vocabulary of {self.traits.vocab_size} tokens and the target one of "
                f"{vocab}; use a drafter made for this target's tokenizer"
            )

    def check_device(self, device: torch.device) -> None:
        """Raise ValueError unless the draft is on `device`, the target's."""
        if self.model.device != device:
            raise ValueError(f"drafter {self.name} is on {self.model.device} and the target on {device}; move it")

    def open(self, request: DraftRequest) -> DraftSession:
        self.check_device(request.device)
        check_children(request.shape, request.vocab_size if self.vocabulary is None else len(self.vocabulary))
        if isinstance(request.shape, DynamicShape):
            from .dynamic_tree import DynamicDraftSession

            return DynamicDraftSession(self.model, request, self.vocabulary)
        return StaticDraftSession(self.model, request, self.vocabulary)


class ModelDraftSession:
    """What every run of a draft model has: a cache, and how a step begins."""

    def __init__(self, model: PreTrainedModel, request: DraftRequest, vocabulary: Tensor | None = None):
        self.vocabulary = vocabulary  # (V',): what the logits stand for; None is all tokens
        self.slots = SlotModel(model, request.batch, request.capacity)

    @property
    def packable(self) -> list[torch.nn.Module]:
        return self.slots.packable

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes

    def clear(self, rows: Tensor | None = None) -> None:
        self.slots.clear(rows)

    def read(self, span: Span, features: Tensor | None) -> None:
        self.slots.read(span)

    def copy_rows(self, other: Self, rows: Tensor) -> None:
        self.slots.copy_rows(other.slots, rows)

    def _root_logits(self, state: DecodeState, base: Tensor) -> Tensor:
        """Forward the last two committed tokens: the root, and the one before it, which may be a leaf of
        the last tree. A row of one token has none before it: that column is padding. (B, 1, V')"""
        pair = torch.stack([base - 1, base], dim=1)  # (B, 2) slots
        tokens = state.tokens.gather(1, pair.clamp(min=0))
        return self.slots.forward_text(tokens, pair).logits


class StaticDraftSession(ModelDraftSession):
    """A fixed tree: the inner nodes of each level are forwarded together."""

    def __init__(self, model: PreTrainedModel, request: DraftRequest, vocabulary: Tensor | None = None):
        super().__init__(model, request, vocabulary)
        self.static = StaticTree(request, vocabulary)

    def propose(self, state: DecodeState) -> Proposal:
        base = state.lengths - 1

        def logits_of(depth: int, inner: Tensor, tokens: Tensor) -> Tensor:
            if depth == 0:
                return self._root_logits(state, base)  # (B, 1, V')
            return self.slots.forward_nodes(tokens[:, inner], base, self.static.tree, inner).logits  # (B, n, V')

        return self.static.fill(state, logits_of)

    def follow(self, base: Tensor, path: Tensor, count: Tensor, features: Tensor | None) -> None:
        self.slots.commit(base, path, count)
