"""From logits to the scores that tokens are drawn from, with transformers' logits processors.

Processors that look at the logits alone are vectorised over all nodes. Temperature, top-k, top-p and min-p read their
values from the row's state, so that other values need no new compiled step. If some processors look at the history
(repetition penalty, n-gram bans, the user's own), all processors up to the last of these run node by node, each on the
node's own path, as if its tokens had come one by one; they read the state on the host and cannot be captured. Drawing
a token from the scores is left to verify.py, which adds the noise.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from .proposal import NO_TOKEN, Proposal
from .request import RowSampling
from .state import DecodeState

Processors = list[hf.LogitsProcessor]  # or a LogitsProcessorList
CAPTURABLE = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.SuppressTokensLogitsProcessor,
    hf.LogitNormalization,
)
HISTORY_FREE = (*CAPTURABLE, hf.TopHLogitsWarper, hf.InfNanRemoveLogitsProcessor)
STATEFUL = (
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    hf.SynthIDTextWatermarkLogitsProcessor,
)


# The processors whose values are stored per row, in the order in which transformers applies them.
BY_ROW = (hf.TemperatureLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.MinPLogitsWarper)


@dataclass(frozen=True, slots=True)
class RowWarp:
    """Temperature, top-k, top-p and min-p with each row's values from the state, computed as by transformers'
    processors. Which of them apply is fixed, and `most` bounds top-k; all else is data."""

    temperature: bool = False
    most: int = 0  # the largest top-k that it can apply; 0: no top-k
    top_p: bool = False
    min_p: bool = False

    def __call__(self, scores: Tensor, state: DecodeState) -> Tensor:  # (B, N, V) -> (B, N, V)
        if self.temperature:
            scores = scores / state.temperature[:, None, None]
        if self.most:
            best = scores.topk(min(self.most, scores.shape[-1]), dim=-1).values
            last = (state.top_k.clamp(max=best.shape[-1]) - 1)[:, None, None].expand(-1, scores.shape[1], 1)
            unlimited = (state.top_k > best.shape[-1])[:, None, None]
            scores = scores.masked_fill((scores < best.gather(-1, last)) & ~unlimited, -torch.inf)
        if self.top_p:
            ascending, order = scores.sort(descending=False, dim=-1)
            cut = ascending.softmax(-1).cumsum(-1) <= state.tail[:, None, None]
            cut[..., -1:].fill_(False)
            scores = scores.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
        if self.min_p:
            probs = scores.softmax(-1)
            least = state.min_p[:, None, None] * probs.amax(-1, keepdim=True)
            keep = torch.arange(scores.shape[-1], device=scores.device) == scores.argmax(-1, keepdim=True)
            scores = scores.masked_fill((probs < least) & ~keep, -torch.inf)
        return scores


class Sampler:
    """Turns logits (B, N, V) of a tree into scores (B, N, V).

    `prompt` (B, P) is the batch as the user gave it, left padding included, because that is what
    processors see; `pads` (B,) counts the padding, and is negative where the text begins with so many tokens that the
    user did not name. Raises ValueError for a processor that keeps a state
    of its own between calls, which drafted tokens would corrupt.
    """

    def __init__(self, processors: Processors, do_sample: bool, prompt: Tensor, pads: Tensor):
        for processor in processors:
            if isinstance(processor, STATEFUL):
                raise ValueError(
                    f"{type(processor).__name__} keeps a state from token to token, which speculative decoding "
                    "cannot score; use model.generate for it"
                )
        history = [i for i, processor in enumerate(processors) if type(processor) not in HISTORY_FREE]
        split = history[-1] + 1 if history else 0
        self.per_path = processors[:split]
        self.do_sample = do_sample
        self.prompt = prompt
        self.pads = pads
        flat = [*processors[split:], *self.per_path]
        # The last temperature among the processors: what drafts are drawn at, too.
        self.temperature = next((p.temperature for p in flat if isinstance(p, hf.TemperatureLogitsWarper)), 1.0)
        self.before, warped, self.after = _row_warped(processors[split:] if do_sample else [], processors[split:])
        self.numbers = {type(processor): processor for processor in warped}
        self.warp = self._warp()

    def _warp(self) -> RowWarp:
        top_k = self.numbers.get(hf.TopKLogitsWarper)
        return RowWarp(
            temperature=hf.TemperatureLogitsWarper in self.numbers,
            most=0 if top_k is None else max(64, 1 << (top_k.top_k - 1).bit_length()),
            top_p=hf.TopPLogitsWarper in self.numbers,
            min_p=hf.MinPLogitsWarper in self.numbers,
        )

    @property
    def row_sampling(self) -> RowSampling:
        """The values to store in a row."""
        top_k, top_p, min_p = (self.numbers.get(kind) for kind in BY_ROW[1:])
        return RowSampling(
            temperature=float(self.temperature),
            top_k=1 if top_k is None else int(top_k.top_k),
            tail=0.0 if top_p is None else 1 - top_p.top_p,
            min_p=0.0 if min_p is None else float(min_p.min_p),
        )

    @property
    def capturable(self) -> bool:
        """Whether a step with these processors can be compiled or captured."""
        return not self.per_path and all(type(processor) in CAPTURABLE for processor in self.before + self.after)

    @property
    def signature(self) -> tuple:
        """Equal for samplers that one captured step can serve; values stored per row are no part of it."""
        return self.do_sample, self.warp, tuple(map(_settings, self.before)), tuple(map(_settings, self.after))

    def scores(self, logits: Tensor, proposal: Proposal, state: DecodeState) -> Tensor:
        """The scores (B, N, V) at all nodes."""
        return self._vectorised(self._walk_paths(logits, proposal, state) if self.per_path else logits, state)

    def scores_at(self, node: Tensor, going: Tensor, logits: Tensor, proposal: Proposal, state: DecodeState) -> Tensor:
        """The scores (B, V) at one `node` (B,) of each row, of which the logits are (B, V), in rows that are `going`
        (B,); in the others only what is vectorised is applied."""
        if self.per_path:
            logits = logits.clone()
            for row in going.nonzero()[:, 0].tolist():
                path = self._text_at(row, int(node[row]), proposal, state)
                if path is not None:
                    logits[row] = self._process(row, path, logits[row])
        return self._vectorised(logits[:, None], state)[:, 0]

    def _vectorised(self, scores: Tensor, state: DecodeState) -> Tensor:  # (B, N, V) -> (B, N, V)
        return _processed(self.after, self.warp(_processed(self.before, scores), state))

    def _walk_paths(self, logits: Tensor, proposal: Proposal, state: DecodeState) -> Tensor:
        scores = logits.clone()
        parents = proposal.tree.parents.expand(len(logits), -1).tolist()
        drafted = proposal.tokens.tolist()
        for row, finished in enumerate(state.done.tolist()):
            if finished:
                continue
            ends, limit = self._bounds(row, state)
            texts = [self._text(row, state)]  # [node]: the text up to the node, included; None if impossible
            for node, token in enumerate(drafted[row]):
                if node > 0:
                    parent = parents[row][node]
                    drawable = token != NO_TOKEN and bool(scores[row, parent, token] > -torch.inf)
                    texts.append(_extend(texts[parent], token, parent > 0, ends, limit) if drawable else None)
                if (path := texts[node]) is not None:
                    scores[row, node] = self._process(row, path, logits[row, node])
        return scores

    def _text(self, row: int, state: DecodeState) -> Tensor | None:
        """The text of a row so far, as processors see it."""
        pad = int(self.pads[row])
        return torch.cat([self.prompt[row, : max(pad, 0)], state.tokens[row, max(-pad, 0) : int(state.lengths[row])]])

    def _bounds(self, row: int, state: DecodeState) -> tuple[set[int], int]:
        """The ends of text of a row, and the length at which it is full."""
        return set(state.eos[row].tolist()), int(state.limits[row] + self.pads[row])

    def _text_at(self, row: int, node: int, proposal: Proposal, state: DecodeState) -> Tensor | None:
        """The text of a row up to a node, included, whose tokens were drawn; None behind an end of text."""
        tree, (ends, limit) = proposal.tree, self._bounds(row, state)
        shared = min(row, len(tree.paths) - 1)
        path = tree.paths[shared, node, 1 : int(tree.depths[shared, node]) + 1]
        text = self._text(row, state)
        for number, token in enumerate(proposal.tokens[row, path].tolist()):
            text = _extend(text, token, number > 0, ends, limit)
        return text

    def _process(self, row: int, text: Tensor, scores: Tensor) -> Tensor:
        """The scores (V,) of one row after its `text`. Processors are called with a whole batch in which the row has
        its usual index, because some keep data per row."""
        batch = len(self.prompt)
        for processor in self.per_path:
            if isinstance(processor, hf.PrefixConstrainedLogitsProcessor):
                # Calls the user's function for this row only, by the index of its prompt.
                allowed = partial(processor._prefix_allowed_tokens_fn, row // processor._num_beams)
                row_processor = hf.PrefixConstrainedLogitsProcessor(lambda _, ids, allowed=allowed: allowed(ids), 1)
                scores = row_processor(text[None], scores[None].clone())[0]
            else:
                scores = processor(text.expand(batch, -1), scores.expand(batch, -1).clone())[row]
        return scores


def _row_warped(sampling: Processors, all_of_them: Processors) -> tuple[Processors, Processors, Processors]:
    """Split the processors into those before, in and after the first run of processors that `RowWarp` can replace: of
    `BY_ROW`, in its order, with default filter value and minimum. `sampling` is empty where nothing is drawn."""
    start = next((i for i, processor in enumerate(sampling) if _rank(processor) is not None), len(all_of_them))
    stop, last = start, -1
    while stop < len(sampling) and (rank := _rank(sampling[stop])) is not None and rank > last:
        stop, last = stop + 1, rank
    return all_of_them[:start], all_of_them[start:stop], all_of_them[stop:]


def _rank(processor: hf.LogitsProcessor) -> int | None:
    """The index of a processor in `BY_ROW`; None for others, and for unusual settings that `RowWarp` does not cover."""
    plain = getattr(processor, "filter_value", -math.inf) == -math.inf
    plain = plain and getattr(processor, "min_tokens_to_keep", 1) == 1
    return BY_ROW.index(type(processor)) if plain and type(processor) in BY_ROW else None


def _settings(processor: hf.LogitsProcessor) -> tuple[str, str]:
    """Type and settings of a processor; equal for processors that compute the same."""
    settings = {
        name: value.tolist() if isinstance(value, Tensor) else value for name, value in sorted(vars(processor).items())
    }
    return type(processor).__name__, repr(settings)


def _processed(processors: Processors, scores: Tensor) -> Tensor:  # (B, N, V) -> (B, N, V)
    if not processors:
        return scores
    flat = scores.flatten(0, 1)
    for processor in processors:
        flat = processor(None, flat)
    return flat.view_as(scores)


def _extend(text: Tensor | None, token: int, drafted: bool, eos: set[int], limit: int) -> Tensor | None:
    """`text` with `token` appended; None after an end of text or beyond the row's limit. Tokens that plain decoding
    could not have drawn are left out, too, so that a user's processor never sees a history that cannot occur."""
    if text is None or len(text) + 1 >= limit or (drafted and int(text[-1]) in eos):
        return None
    return torch.cat([text, text.new_tensor([token])])


def warpers(temperature: float, top_p: float = 1.0) -> hf.LogitsProcessorList:
    """Temperature and nucleus as `generate` applies them; temperature 0 is greedy and has none."""
    made = hf.LogitsProcessorList()
    if temperature > 0 and temperature != 1:
        made.append(hf.TemperatureLogitsWarper(float(temperature)))
    if temperature > 0 and top_p < 1:
        made.append(hf.TopPLogitsWarper(top_p))
    return made
