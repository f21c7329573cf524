"""A small causal LM as drafter: one forward per tree level, with a KV cache of its own.

How it drafts is in draft_session.py, static_tree.py (fixed trees) and dynamic_tree.py (trees that follow its
confidence). Knows nothing of verification.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..spec.engines.module_state import numbers
from ..spec.plan.trees import Rates, default_tree
from ..spec.proposal import DrafterTraits, DraftRequest, DraftSession
from ..spec.target.selftest import attach
from ..spec.target.weights import Weights
from ..spec.tree import TreeShape
from .blocks import put_in_blocks
from .complete import complete
from .draft_session import ModelSession
from .draft_vocabulary import Tokenizers, fit
from .folder import DrafterFolder
from .known_tokens import WidenedHead, head_of_rows, read_known, reading, with_head
from .static_tree import check_children
from .token_overlap import SharedTokens

DEEPEST = 4  # levels of the default tree: each costs a forward


class ModelDrafter:
    """`model` is any causal LM that passes the same self-test as a target. `rates` is the acceptance p[depth][rank]
    from which the default tree is planned; without it the default is a chain.

    With `vocabulary` (V',), ascending ids, it drafts these tokens only. With `shared` it is for a target of another
    vocabulary, drafts the tokens in common, and reads the target's tokens as its own. In both cases it runs a copy of
    `model` on the same weights, whose LM head computes the logits of these tokens alone."""

    def __init__(
        self,
        model: PreTrainedModel,
        name: str = "draft model",
        rates: Rates | None = None,
        vocabulary: Tensor | None = None,
        shared: SharedTokens | None = None,
    ):
        attach(model)
        self.shared, self.name = shared, name
        self.vocab_size = model.config.get_text_config().vocab_size if shared is None else len(shared.reads)
        rows = vocabulary if shared is None else shared.rows
        self.vocabulary = _placed(vocabulary if shared is None else shared.ids, model)
        self.reads = _placed(None if shared is None else shared.reads, model)
        self.model, self.head_numbers = model, 0
        if rows is not None:
            head = model.get_output_embeddings()
            self.model = with_head(model, head_of_rows(head, rows.to(model.device)))
            self.head_numbers = numbers(head)
        on_cpu = model.device.type == "cpu"
        self.default_shape = default_tree(rates, DEEPEST, on_cpu) if rates else TreeShape.chain(DEEPEST)
        self.traits = DrafterTraits(
            self.vocab_size, follows_any_tree=True, fills_dynamic=True, deepest=DEEPEST, modules=(self.model,),
            vocabulary=self.vocabulary, reads=self.reads, causal_lm=self._whole_model(), kind="draft_lm",
            catches_up=True,
        )  # fmt: skip

    @classmethod
    def load(
        cls,
        source: str | Path,
        folder: DrafterFolder | None,
        target: PreTrainedModel,
        tokenizers: Tokenizers = (None, None),
    ) -> "ModelDrafter":
        """The draft model of a folder, a hub id or a short name; `folder` is None where Paceline did not train it.
        `tokenizers` are the target's and its own, where they do not lie with the models.

        Raises ValueError where it cannot be loaded or shares too few tokens with `target`."""
        model, name = complete(source, target), Path(str(source)).name
        if folder is None:
            return cls(model, name, shared=fit(model, name, target, tokenizers, fetch=True))
        vocab = target.config.get_text_config().vocab_size
        known = read_known(folder.path, folder.config.get("known_tokens"), vocab)
        drafter = cls(model, name, folder.rates(), known)
        drafter.check_vocabulary(target)
        return drafter

    @classmethod
    def around(
        cls, model: PreTrainedModel, target: PreTrainedModel, tokenizers: Tokenizers = (None, None)
    ) -> "ModelDrafter":
        """The drafter of a loaded model for `target`, stored on the model so that later calls reuse it and its
        compiled steps. Raises ValueError where it shares too few tokens with `target`."""
        name = Path(str(getattr(model.config, "_name_or_path", "") or type(model).__name__)).name
        shared = fit(model, name, target, tokenizers)
        of, drafter = model.__dict__.get("_paceline_drafter", (None, None))
        if of is not model or not drafter._is_up_to_date(model, shared):  # of another in a copy
            drafter = cls(model, name, shared=shared)
            model.__dict__["_paceline_drafter"] = model, drafter
        attach(model)  # again, as the model may have changed
        return drafter

    def _is_up_to_date(self, model: PreTrainedModel, shared: SharedTokens | None) -> bool:
        if self.shared is not shared:
            return False
        if shared is None:
            return self.vocab_size == model.config.get_text_config().vocab_size
        return self.head_numbers == numbers(model.get_output_embeddings())  # of which it may have copied rows

    def put_in_blocks(self, weights: Weights) -> None:
        """Round the linear layers of the model, which is the drafter's own, to blocks of few bits."""
        put_in_blocks(self.model, weights)
        self.name += f" in {weights.name}"
        self.traits = replace(self.traits, causal_lm=self._whole_model())

    def _whole_model(self) -> PreTrainedModel:
        """The draft as an ordinary causal LM with logits of the target's whole vocabulary, on the same weights."""
        if self.vocabulary is None:
            return self.model
        widened = WidenedHead(self.model.get_output_embeddings(), self.vocabulary, self.vocab_size)
        whole = with_head(self.model, widened)
        return whole if self.reads is None else reading(whole, self.reads)

    def check_vocabulary(self, target: PreTrainedModel) -> None:
        """Raise ValueError unless it is for a vocabulary as large as the target's."""
        vocab = target.config.get_text_config().vocab_size
        if self.vocab_size != vocab:
            raise ValueError(
                f"drafter {self.name} is for a vocabulary of {self.vocab_size} tokens and the target has one of "
                f"{vocab}; load it for this target"
            )

    def check_device(self, device: torch.device) -> None:
        """Raise ValueError unless the draft is on `device`, the target's."""
        if self.model.device != device:
            raise ValueError(f"drafter {self.name} is on {self.model.device} and the target on {device}; move it")

    def open(self, request: DraftRequest) -> DraftSession:
        self.check_device(request.device)
        check_children(request.shape, request.vocab_size if self.vocabulary is None else len(self.vocabulary))
        return ModelSession(self.model, request, self.vocabulary, self.reads)


def _placed(ids: Tensor | None, model: PreTrainedModel) -> Tensor | None:
    return None if ids is None else ids.to(model.device)
