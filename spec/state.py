"""The decode state: the persistent buffers that the step reads and writes, one row per text.

The first axis of every buffer is the batch, and its address is fixed for the whole run. A committed token's position is
also its cache slot, because rows hold no padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .request import Request

NO_END = -2  # fills `eos`; neither a token nor NO_TOKEN, the value of an empty node
NO_TICKET = 0  # of a row without a request
MOST_BIASED = 64  # tokens of a row whose scores can be changed


def index_of(rows: Tensor | None) -> Tensor | slice:
    """Index of `rows` (R,) in a buffer whose first axis is the batch; None: of all rows."""
    return slice(None) if rows is None else rows


@dataclass(slots=True, eq=False)
class DecodeState:
    """B rows of at most `capacity - 1` tokens; writes that must have no effect go to the last column."""

    tokens: Tensor  # (B, capacity): the committed text
    begun: Tensor  # (B,): tokens of the prompt
    beside: Tensor  # (B,): how much longer the longest prompt of its batch is
    lengths: Tensor  # (B,): committed tokens; the last of them, the root, is not in the cache yet
    limits: Tensor  # (B,): the length at which a row is full
    done: Tensor  # (B,) bool
    failed: Tensor  # (B,) bool: the scores held a NaN, or forbade every token
    ticket: Tensor  # (B,): the request in the row, see rows.py
    keys: Tensor  # (B, 2): the row's noise stream
    eos: Tensor  # (B, E): token ids that end the row, NO_END where there are fewer
    temperature: Tensor  # (B,): for sampling and drafting; 1 where the row is greedy
    top_k: Tensor  # (B,): how many tokens the row is drawn from at most
    tail: Tensor  # (B,): 1 - top_p, the probability that is cut off
    min_p: Tensor  # (B,): the least probability, as a share of the likeliest token's
    repetition: Tensor  # (B,): what scores of tokens of the text are divided by, or multiplied with below 0; 1 for none
    presence: Tensor  # (B,): subtracted once from the scores of new tokens of the text
    frequency: Tensor  # (B,): subtracted for each time that a token is among them
    biased: Tensor  # (B, K): tokens whose scores are changed; 0 where there are fewer, by 0
    bias: Tensor  # (B, K): what is added to these scores
    predicted: Tensor  # (B, P): what the text may copy from, besides itself; P is 0 where nobody predicts
    foretold: Tensor  # (B,): how many tokens of these there are
    committed: Tensor  # (B,): tokens committed by the last step

    @classmethod
    def empty(cls, batch: int, capacity: int, eos: int, device: torch.device, predicted: int = 0) -> "DecodeState":
        """Buffers for `batch` rows of at most `eos` end-of-text ids and `predicted` tokens; every row is done until a
        text is admitted."""

        def numbers(*shape: int) -> Tensor:
            return torch.ones(shape, dtype=torch.int64, device=device)

        flags = torch.ones(batch, dtype=torch.bool, device=device)
        return cls(
            tokens=numbers(batch, capacity),
            begun=numbers(batch),
            beside=numbers(batch) * 0,
            lengths=numbers(batch),
            limits=numbers(batch),
            done=flags,
            failed=~flags,
            ticket=numbers(batch) * NO_TICKET,
            keys=numbers(batch, 2),
            eos=numbers(batch, eos) * NO_END,
            temperature=torch.ones(batch, device=device),
            top_k=numbers(batch),
            tail=torch.zeros(batch, device=device),
            min_p=torch.zeros(batch, device=device),
            repetition=torch.ones(batch, device=device),
            presence=torch.zeros(batch, device=device),
            frequency=torch.zeros(batch, device=device),
            biased=numbers(batch, MOST_BIASED) * 0,
            bias=torch.zeros(batch, MOST_BIASED, device=device),
            predicted=numbers(batch, predicted),
            foretold=numbers(batch) * 0,
            committed=numbers(batch),
        )

    def admit(self, rows: Tensor, requests: Sequence[Request], tickets: Sequence[int]) -> None:
        """Write the texts and settings of R `requests` to `rows` (R,)."""
        device, texts = rows.device, [request.tokens for request in requests]
        width = max(map(len, texts))
        self.tokens[rows] = 0
        padded = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)  # (R, width)
        self.tokens[rows[:, None], torch.arange(width, device=device)] = padded
        ends = [[*request.ends, *[NO_END] * (self.eos.shape[1] - len(request.ends))] for request in requests]
        lengths = torch.tensor([len(text) for text in texts], device=device)
        for buffer, values in (
            (self.begun, lengths),
            (self.beside, torch.tensor([request.beside for request in requests], device=device)),
            (self.lengths, lengths),
            (self.limits, lengths + torch.tensor([request.new_tokens for request in requests], device=device)),
            (self.ticket, torch.tensor(tickets, device=device)),
            (self.keys, torch.tensor([request.key for request in requests], device=device)),
            (self.eos, torch.tensor(ends, dtype=torch.int64, device=device)),
        ):
            buffer[rows] = values
        most = self.predicted.shape[1]
        foretold = [[*request.predicted[:most]] for request in requests]
        filled = [[*tokens, *[0] * (most - len(tokens))] for tokens in foretold]
        self.predicted[rows] = torch.tensor(filled, dtype=torch.int64, device=device).view(len(requests), most)
        self.foretold[rows] = torch.tensor([len(tokens) for tokens in foretold], device=device)
        biases = [[*request.sampling.bias, *[(0, 0.0)] * MOST_BIASED][:MOST_BIASED] for request in requests]
        self.biased[rows] = torch.tensor([[token for token, _ in bias] for bias in biases], device=device)
        self.bias[rows] = torch.tensor([[value for _, value in bias] for bias in biases], device=device)
        for name in ("temperature", "top_k", "tail", "min_p", "repetition", "presence", "frequency"):
            buffer = getattr(self, name)
            numbers = [getattr(request.sampling, name) for request in requests]
            buffer[rows] = torch.tensor(numbers, dtype=buffer.dtype, device=device)
        for buffer in (self.done, self.failed, self.committed):
            buffer[rows] = 0

    def copy_rows(self, other: "DecodeState", rows: Tensor, into: Tensor | None = None) -> None:
        """Copy `rows` (R,) of `other`, which has as many ends of text, into the rows `into` (R,) of this state, None:
        into all of them. Where the capacities differ, the columns that both have are copied."""
        index = index_of(into)
        for field in fields(self):
            target, source = getattr(self, field.name), getattr(other, field.name)
            if field.name in ("tokens", "predicted"):
                shared = min(target.shape[1], source.shape[1])
                target, source = target[:, :shared], source[:, :shared]
            target[index] = source[rows]

    def roots(self) -> Tensor:
        """The last committed token of each row, (B, 1)."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)
