"""From logits to the scores that a token is drawn from: transformers' own logits processors.

Processors that look at the logits alone run vectorised over all nodes. From the first to the last one
that looks at the history (repetition penalty, n-gram bans, the user's own), each node is processed on
its own path, as if its tokens had come one by one. Those read the state on the host and cannot be
captured. Draws are not made here.
"""

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from .proposal import NO_TOKEN, Proposal
from .state import DecodeState

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


class Sampler:
    """Turns logits (B, N, V) of a tree into scores (B, N, V).

    `prompt` (B, P) is the batch as the user gave it, left padding included, because that is what
    processors see; `pads` (B,) counts the padding. Raises ValueError for a processor that keeps a state
    of its own between calls, which drafted tokens would corrupt.
    """

    def __init__(self, processors: list, do_sample: bool, prompt: Tensor, pads: Tensor):
        for processor in processors:
            if isinstance(processor, STATEFUL):
                raise ValueError(
                    f"{type(processor).__name__} keeps a state from token to token, which speculative decoding "
                    "cannot score; use model.generate for it"
                )
        history = [i for i, processor in enumerate(processors) if type(processor) not in HISTORY_FREE]
        split = history[-1] + 1 if history else 0
        self.per_path = processors[:split]
        self.vectorised = processors[split:]
        self.do_sample = do_sample
        self.prompt = prompt
        self.pads = pads

    @property
    def capturable(self) -> bool:
        """Whether a step with these processors can be compiled or captured."""
        return not self.per_path and all(type(processor) in CAPTURABLE for processor in self.vectorised)

    @property
    def signature(self) -> tuple:
        """Equal for samplers whose capturable processors do the same."""
        settings = [
            {name: value.tolist() if isinstance(value, Tensor) else value for name, value in sorted(vars(p).items())}
            for p in self.vectorised
        ]
        return self.do_sample, tuple((type(p).__name__, repr(own)) for p, own in zip(self.vectorised, settings))

    @property
    def temperature(self) -> float:
        """The last temperature among the processors; 1 where there is none."""
        flat = [*self.vectorised, *self.per_path]
        return next((p.temperature for p in flat if isinstance(p, hf.TemperatureLogitsWarper)), 1.0)

    def scores(self, logits: Tensor, proposal: Proposal, state: DecodeState) -> Tensor:
        if self.per_path:
            logits = self._walk_paths(logits, proposal, state)
        flat = logits.flatten(0, 1)
        for processor in self.vectorised:
            flat = processor(None, flat)
        return flat.view_as(logits)

    def _walk_paths(self, logits: Tensor, proposal: Proposal, state: DecodeState) -> Tensor:
        scores = logits.clone()
        parents = proposal.tree.parents.expand(len(logits), -1).tolist()
        drafted = proposal.tokens.tolist()
        lengths, eos = state.lengths.tolist(), set(state.eos.tolist())
        limits = (state.limits + self.pads).tolist()
        for row, finished in enumerate(state.done.tolist()):
            if finished:
                continue
            text = torch.cat([self.prompt[row, : self.pads[row]], state.tokens[row, : lengths[row]]])
            texts = [text]  # [node]: the text up to and with the node, None where it cannot come about
            for node, token in enumerate(drafted[row]):
                if node > 0:
                    parent = parents[row][node]
                    texts.append(_extend(texts[parent], token, scores[row, parent], parent > 0, eos, limits[row]))
                if texts[node] is not None:
                    scores[row, node] = self._process(row, texts[node], logits[row, node])
        return scores

    def _process(self, row: int, text: Tensor, scores: Tensor) -> Tensor:
        """One row's scores (V,) behind its `text`, with every processor seeing a batch in which the row has
        its own place, because some keep something for each row."""
        batch = len(self.prompt)
        for processor in self.per_path:
            if isinstance(processor, hf.PrefixConstrainedLogitsProcessor):
                allowed = processor._prefix_allowed_tokens_fn  # the user's, to be asked for this row only
                own = hf.PrefixConstrainedLogitsProcessor(lambda _, ids, allowed=allowed: allowed(row, ids), 1)
                scores = own(text[None], scores[None].clone())[0]
            else:
                scores = processor(text.expand(batch, -1), scores.expand(batch, -1).clone())[row]
        return scores


def _extend(text: Tensor | None, token: int, scores: Tensor, drafted: bool, eos: set[int], limit: int) -> Tensor | None:
    """`text` and one token more; None behind an end of text or beyond the row's limit, or for a token that
    plain decoding could not have drawn, so that a user's processor never sees a history that cannot be."""
    ended = text is None or len(text) + 1 >= limit or (drafted and int(text[-1]) in eos)
    if ended or token == NO_TOKEN or not scores[token] > -torch.inf:
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
