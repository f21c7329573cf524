"""The objective for a small causal LM with the target's tokenizer: pretraining on raw text, distillation.

The network comes from draft_network.py; it is saved as an ordinary Hugging Face model. The statistics are those of
greedy chain drafts on the target's own text with the rule `match`: a depth is a hit where the draft's best token is the
text's token and all earlier depths were hits. Knows nothing of optimisers or processes.
"""

import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from ...drafters.draft_model import ModelDrafter
from ...drafters.folder import FORMAT, DrafterFolder, origin_of, target_identity
from ...drafters.known_tokens import places, read_known, trimmed_head, write_known
from ...spec.files import whole
from ...spec.target.taps import HEAD, hidden_states
from ...spec.target.tokenizers import load_tokenizer
from ...spec.target.weights import linear_shape
from ..config import read
from .draft_network import Sizes, make_network, share, target_weights
from .known_tokens import frequent_tokens, of_known
from .losses import check_mixture, mixed_loss
from .objective import NO_LABEL, Batch, Judge, Losses, Objective, TargetView, windows
from .start import start_folder


@dataclass(frozen=True, kw_only=True)
class Save:
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto is the target's
    without_target_weights: bool = False  # leave out what is frozen from the target; `load_drafter` puts it back


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`start` says where the network comes from, or else exactly one of `sizes` and `layers`."""

    kind: Literal["draft_lm"] = "draft_lm"
    sizes: Sizes | None = None
    layers: list[int] | None = None  # of the target, counted from 0, with its embeddings, norm and head
    start: str | None = None  # an earlier draft, such as a pretrained one or one of the target's base model
    embeddings: Literal["own", "target"] = "own"  # target: the target's, frozen
    head: Literal["own", "target"] = "own"
    known_tokens: int | None = None  # draft only so many of the commonest in the data; None is the whole vocabulary
    losses: dict[str, float] = field(default_factory=lambda: {"cross_entropy": 1.0})  # weights, see losses.py
    depths: int = 4  # steps of a chain to report
    chunk: int = 256  # tokens whose logits are held at once
    save: Save = field(default_factory=Save)


class DraftObjective(Objective):
    """`model` is the draft; `target` is asked for its identity and tokenizer only."""

    def __init__(self, model, settings: Settings, target, vocabulary: Tensor | None = None):
        super().__init__()
        self.model = model
        self.known = None if vocabulary is None else Known(model, vocabulary)
        self.depths = settings.depths
        self.losses = check_mixture(settings.losses)
        self.taps = () if set(self.losses) == {"cross_entropy"} else (HEAD,)
        self.chunk = settings.chunk
        self.settings = settings
        self.saved_dtype = target.dtype if settings.save.dtype == "auto" else getattr(torch, settings.save.dtype)
        model.config.known_tokens = None if vocabulary is None else len(vocabulary)
        model.config.paceline_drafter = "draft_lm"
        model.config.paceline_format = FORMAT
        model.config.paceline_target = target_identity(target)
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(target.generation_config, name) for name in tokens})
        where = getattr(target, "adapter_folder", None) or target.name_or_path
        self.tokenizer = load_tokenizer(where) if where else None

    @classmethod
    def build(cls, settings: dict, target, rows: Iterable[dict] = ()) -> "DraftObjective":
        """The objective that the `objective` section of a configuration describes, in float32 on the target's
        device; `rows` of training data say which tokens are common. Raises ValueError for settings that do not fit
        the target or one another."""
        read_ = read(Settings, settings, "objective")
        given = [name for name in ("sizes", "layers") if getattr(read_, name) is not None]
        if len(given) != 1 and read_.start is None:
            raise ValueError(f"objective has {' and '.join(given) or 'no origin'}; give one of sizes, layers and start")
        if given and read_.start is not None:
            unused = " and ".join(f"objective.{name}" for name in given)
            print(f"objective.start {read_.start} gives the network, and {unused} have no effect", file=sys.stderr)
        if read_.depths < 1 or read_.chunk < 1:
            raise ValueError(f"objective.depths {read_.depths} and objective.chunk {read_.chunk} must be at least 1")
        if read_.save.without_target_weights and "target" not in (read_.embeddings, read_.head):
            raise ValueError(
                "objective.save.without_target_weights leaves out what is frozen from the target, and nothing is; "
                "set objective.embeddings or objective.head to target"
            )
        if read_.known_tokens is not None and read_.head != "target":
            raise ValueError("objective.known_tokens needs the target's LM head; set objective.head to target")
        model = make_network(read_, target).to(target.device).train()
        share(model, read_, target)
        started = start_folder(read_.start)
        vocabulary = _known(read_, started, rows, target.config.get_text_config().vocab_size)
        made = cls(model, read_, target, None if vocabulary is None else vocabulary.to(target.device))
        vars(model.config).pop("paceline_start", None)  # where that one began
        if started is not None:
            model.config.paceline_start = origin_of(started)
        return made

    @classmethod
    def judge(cls, drafter: ModelDrafter, model, depths: int) -> Judge:
        return lambda batch: (
            draft_ranks(drafter.model, batch, depths, known=drafter.vocabulary, reads=drafter.reads),
            next_tokens(batch)[1],
        )

    def forward(self, batch: Batch, seen: TargetView | None) -> Losses:
        """Labels outside the draft's vocabulary count as misses and have no loss."""
        labels, counted = next_tokens(batch)  # (B, T-1)
        head, judged = self.model.get_output_embeddings(), counted
        if self.known is not None:
            head, labels = self.known.head, self.known.index_of_token[labels]
            judged = counted & (labels < len(self.known.ids))
        hidden = last_hidden_states(self.model, batch)[judged]  # (N, H)
        target_states_and_head = (None, None)
        if seen is not None:
            law = seen.lm_head if self.known is None else self.known.law(seen.lm_head, seen.hidden.dtype)
            target_states_and_head = seen.hidden[:, :-1][judged], law
        total, top = mixed_loss(self.losses, hidden, head, labels[judged], *target_states_and_head, chunk=self.chunk)
        right = torch.zeros_like(counted).masked_scatter(judged, top == labels[judged])
        return Losses(total, judged.sum(), *chain_statistics(right, counted, self.depths))

    @torch.no_grad()
    def label_ranks(self, batch: Batch, seen: TargetView | None) -> Tensor:
        head, known = (None, None) if self.known is None else (self.known.head, self.known.ids)
        return draft_ranks(self.model, batch, self.depths, self.chunk, head, known)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`embeddings`, `head` (where it is not tied to them) and `layers`, as far as they are trained."""
        embeddings = list(self.model.get_input_embeddings().parameters())
        head = [p for p in self.model.get_output_embeddings().parameters() if not _among(p, embeddings)]
        rest = [p for p in self.model.parameters() if not _among(p, embeddings + head)]
        groups = {"embeddings": embeddings, "head": head, "layers": rest}
        trained = {name: [p for p in group if p.requires_grad] for name, group in groups.items()}
        return {name: group for name, group in trained.items() if group}

    def save(self, folder: Path) -> None:
        model = copy.deepcopy(self.model).to("cpu", self.saved_dtype).eval()
        left_out = target_weights(model, self.settings) if self.settings.save.without_target_weights else {}
        vars(model.config).pop("paceline_left_out", None)  # of the draft that this one started from
        if left_out:
            model.config.paceline_left_out = left_out
        model.save_pretrained(folder)
        if left_out:
            file = folder / "model.safetensors"
            kept = {name: tensor for name, tensor in load_file(file).items() if name not in left_out}
            with whole(file) as unfinished:
                save_file(kept, unfinished, metadata={"format": "pt"})
        if self.known is not None:
            write_known(folder, self.known.ids)
        if self.tokenizer is not None and not left_out:  # nothing but load_drafter reads a folder with gaps
            self.tokenizer.save_pretrained(folder)


def _known(settings: Settings, started: DrafterFolder | None, rows: Iterable[dict], size: int) -> Tensor | None:
    """The tokens that the draft knows: those of the drafter that it starts from, unless the settings ask for another
    number, and then the commonest in `rows`. None for the whole vocabulary of `size`."""
    if started is not None and settings.head == "target":
        known = started.config.get("known_tokens")
        if known is not None and settings.known_tokens in (None, known):
            return read_known(started.path, known, size)
    return None if settings.known_tokens is None else frequent_tokens(rows, settings.known_tokens, size)


def last_hidden_states(model, batch: Batch) -> Tensor:
    """The LM head's input at every token except the last, (B, T-1, H)."""
    rows = batch["input_ids"], batch["position_ids"]
    return hidden_states(model, (HEAD,), *rows, at_once=True)[HEAD][:, :-1]


def next_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """The next token of every token except the last, and where it counts: in the loss and of the same document;
    (B, T-1) each."""
    same = batch["document"][:, 1:] == batch["document"][:, :-1]
    counted = same & (batch["document"][:, 1:] >= 0) & (batch["loss_mask"][:, 1:] > 0)
    return batch["input_ids"][:, 1:], counted


class Known:
    """The known tokens `ids` (V',) of a draft, and LM heads trimmed to them. No module, so it adds no parameters."""

    def __init__(self, model, ids: Tensor):
        head = model.get_output_embeddings()
        self.ids, self.head = ids, trimmed_head(head, ids, model.dtype)
        self.index_of_token = places(ids, linear_shape(head)[0])  # (V,)
        self._law: nn.Module | None = None

    def law(self, head: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The target's LM head trimmed to these tokens, for hidden states in `dtype`; its softmax is conditional on one
        of them being next."""
        if self._law is None:
            self._law = of_known(head, self.ids, dtype)
        return self._law


@torch.no_grad()
def draft_ranks(
    model,
    batch: Batch,
    depths: int,
    chunk: int = 256,
    head: nn.Module | None = None,
    known: Tensor | None = None,
    reads: Tensor | None = None,
) -> Tensor:
    """`Objective.label_ranks` of any causal LM that drafts: (n, depths), ties in the order of ids.

    `head` (the model's own if None) gives the logits of the tokens `known` (V',), or of all; `reads` (V,) are its own
    ids of the batch's tokens, where these are of another vocabulary."""
    labels, counted = next_tokens(batch)  # (B, T-1)
    vocab_size = model.config.get_text_config().vocab_size if reads is None else len(reads)
    if reads is not None:
        batch = {**batch, "input_ids": reads[batch["input_ids"]]}
    hidden = last_hidden_states(model, batch)[counted]  # (N, H)
    index_of_token = None if known is None else places(known, vocab_size)
    head, ranks = head or model.get_output_embeddings(), []
    for states, label in zip(hidden.split(chunk), labels[counted, None].split(chunk)):
        logits = head(states)  # (n, V')
        label = label if index_of_token is None else index_of_token[label]
        label_logit = logits.gather(1, label.clamp(max=logits.shape[1] - 1))
        earlier = torch.arange(logits.shape[1], device=label.device) < label
        before = ((logits > label_logit) | ((logits == label_logit) & earlier)).sum(-1)
        ranks.append(torch.where(label[:, 0] < logits.shape[1], before, vocab_size))
    at = labels.new_full(labels.shape, NO_LABEL)
    if ranks:
        at[counted] = torch.cat(ranks)
    ahead = windows(nn.functional.pad(at, (1, 0), value=NO_LABEL), depths, NO_LABEL)[:, :-1]  # (B, T-1, D)
    chain = (ahead != NO_LABEL).cumprod(-1).bool()
    return torch.where(chain, ahead, NO_LABEL)[counted]


def chain_statistics(right: Tensor, counted: Tensor, depths: int) -> tuple[Tensor, Tensor]:
    """Hits and tries (depths,) from where the draft was right and where a token counts, (B, T) each.

    For a chain drafted at every position, depth d is tried where all earlier depths were hits and its token counts."""
    hits, tried = [], []
    alive = torch.ones_like(counted)
    for depth in range(depths):
        alive = alive[:, : counted.shape[1] - depth] & counted[:, depth:]
        tried.append(alive.sum())
        alive = alive & right[:, depth:]
        hits.append(alive.sum())
    return torch.stack(hits), torch.stack(tried)


def _among(parameter: nn.Parameter, others: list[nn.Parameter]) -> bool:
    return any(parameter is candidate for candidate in others)
