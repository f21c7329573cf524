"""From logits to the scores that a token is drawn from: transformers' own logits processors.

Processors that look at the logits alone run vectorised over all nodes. From the first to the last one
that looks at the history (repetition penalty, n-gram bans, the user's own), each node is processed on
its own path, as if its tokens had come one by one. Those read the state on the host and cannot be
captured. Draws are not made here.
"""

import copy

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from .proposal import NO_TOKEN, Proposal
from .state import DecodeState

HISTORY_FREE = (
    hf.TemperatureLogitsWarper,
    hf.TopHLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
)
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
        self.per_path = [_for_rows(p, len(prompt)) for p in processors[:split]]  # [processor][row]
        self.vectorised = processors[split:]
        self.do_sample = do_sample
        self.prompt = prompt
        self.pads = pads

    @property
    def temperature(self) -> float:
        """The last temperature among the processors; 1 where there is none."""
        flat = [*self.vectorised, *(rows[0] for rows in self.per_path)]
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
        for row, finished in enumerate(state.done.tolist()):
            if finished:
                continue
            text = torch.cat([self.prompt[row, : self.pads[row]], state.tokens[row, : lengths[row]]])
            texts = [text]  # [node]: the text up to and with the node, None where it cannot come about
            for node, token in enumerate(drafted[row]):
                if node > 0:
                    parent = parents[row][node]
                    texts.append(_extend(texts[parent], token, scores[row, parent], parent > 0, eos))
                if texts[node] is None:
                    continue
                one = logits[row, node][None].clone()
                for rows in self.per_path:
                    one = rows[row](texts[node][None], one)
                scores[row, node] = one[0]
        return scores


def _extend(text: Tensor | None, token: int, scores: Tensor, drafted: bool, eos: set[int]) -> Tensor | None:
    """`text` and one token more; None behind an end of text, or for a token that plain decoding could
    not have drawn, so that a user's processor never sees a history that it has itself forbidden."""
    ended = text is None or (drafted and int(text[-1]) in eos)
    if ended or token == NO_TOKEN or not scores[token] > -torch.inf:
        return None
    return torch.cat([text, text.new_tensor([token])])


def _for_rows(processor, batch: int) -> list:
    """The processor as each row of the batch sees it, for the ones that keep something per row."""
    if isinstance(processor, hf.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return [
            hf.PrefixConstrainedLogitsProcessor(lambda _, ids, row=row: allowed(row, ids), 1)
            for row in range(batch)
        ]
    per_row = {
        hf.RepetitionPenaltyLogitsProcessor: "prompt_ignore_length",
        hf.EncoderRepetitionPenaltyLogitsProcessor: "encoder_input_ids",
        hf.EncoderNoRepeatNGramLogitsProcessor: "generated_ngrams",
    }.get(type(processor))
    values = getattr(processor, per_row) if per_row else None
    if values is None or isinstance(values, int):
        return [processor] * batch
    copies = [copy.copy(processor) for _ in range(batch)]
    for row, own in enumerate(copies):
        # A batch expanded by num_return_sequences repeats each prompt.
        row = row * len(values) // batch
        setattr(own, per_row, values[row : row + 1])
        if hasattr(own, "batch_size"):
            own.batch_size = 1
    return copies
