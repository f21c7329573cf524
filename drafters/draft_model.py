"""A small causal LM as drafter: one forward per tree level, with a KV cache of its own.

How it drafts is in draft_session.py (fixed trees) and dynamic_tree.py (trees that follow its confidence). Knows nothing
of verification.
"""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..spec.plan.trees import Rates, default_tree
from ..spec.proposal import DrafterTraits, DraftRequest, DraftSession
from ..spec.target.selftest import attach
from ..spec.target.weights import Weights
from ..spec.tree import DynamicShape, TreeShape
from .blocks import put_in_blocks
from .complete import complete
from .draft_session import StaticDraftSession
from .dynamic_tree import DynamicDraftSession
from .folder import DrafterFolder
from .known_tokens import WidenedHead, read_known, trimmed_head
from .static_tree import check_children

DEEPEST = 4  # levels of the default tree: each costs a forward


class ModelDrafter:
    """`model` is any causal LM with the target's vocabulary that passes the same self-test as a target. `rates` is
    the acceptance p[depth][rank] from which the default tree is planned; without it the default is a chain. With
    `vocabulary` (V',), ascending ids, it drafts these tokens only, and its LM head is replaced by one that computes
    their logits alone."""

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
            model.set_output_embeddings(trimmed_head(model.get_output_embeddings(), self.vocabulary, model.dtype))
        self.name = name
        on_cpu = model.device.type == "cpu"
        self.default_shape = default_tree(rates, DEEPEST, on_cpu) if rates else TreeShape.chain(DEEPEST)
        self.traits = DrafterTraits(
            model.config.get_text_config().vocab_size, fills_dynamic=True, deepest=DEEPEST, modules=(model,),
            vocabulary=self.vocabulary, causal_lm=self._whole_model(), kind="draft_lm",
        )  # fmt: skip

    @classmethod
    def load(cls, source: str | Path, folder: DrafterFolder | None, target: PreTrainedModel) -> "ModelDrafter":
        """The draft model of a folder, a hub id or a short name; `folder` is None where Paceline did not train it.

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
        """The drafter of a loaded model, stored on the model so that later calls reuse it and its compiled steps."""
        drafter = model.__dict__.get("_paceline_drafter")
        vocab = model.config.get_text_config().vocab_size
        if drafter is None or drafter.model is not model or drafter.traits.vocab_size != vocab:
            name = Path(str(getattr(model.config, "_name_or_path", "") or type(model).__name__)).name
            drafter = model.__dict__["_paceline_drafter"] = cls(model, name)
        attach(model)  # again, as the model may have changed
        return drafter

    def put_in_blocks(self, weights: Weights) -> None:
        """Round the linear layers of the model, which is the drafter's own, to blocks of few bits."""
        put_in_blocks(self.model, weights)
        self.name += f" in {weights.name}"
        self.traits = replace(self.traits, causal_lm=self._whole_model())

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
            return DynamicDraftSession(self.model, request, self.vocabulary)
        return StaticDraftSession(self.model, request, self.vocabulary)
