"""Calibration on texts that are known: what a drafter would propose at each of their positions.

Greedily, and by the rule `match`, a step accepts the drafted path that the text goes on with, so that a text tells by
itself how much of any tree is accepted. A target whose weights are streamed takes as long for many tokens as for one:
its texts are decoded in rows that share each reading of the weights, and the drafter then drafts along them without the
target. The steps are those of `replay.follow`, which forwards the target at every position. Knows no clock.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..console import Bar
from ..engines.runs import open_engine
from ..kernels.linears import Packing
from ..noise import stream_key
from ..proposal import Drafter, DraftSampling, Proposal
from ..request import Request
from ..sampling import Sampler, warpers
from ..serve.texts import Text, decode_texts
from ..step import Engine
from ..stream.streamer import prompt_chunk
from ..target.protocol import spans
from ..target.slots import SlotModel
from ..trace import Event
from ..tree import DynamicShape, TreeShape

ROWS = 8  # texts at a time
MODEST = DynamicShape(24, 8, 4)  # a tree of each row while texts are decoded
NO_TEXT = -2  # behind the end of a text; neither a token nor NO_TOKEN


@dataclass(frozen=True, slots=True)
class KnownText:
    """A prompt, and what the target made of it with a seed."""

    prompt: list[int]
    new: list[int]
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What is proposed at one position of each of some texts."""

    alive: list[bool]  # [row]: whether its text has this position
    proposal: Proposal
    path: Tensor  # (B, D): the drafted nodes with which the text goes on, from the root's child on; -1 behind the last


def texts_of(
    model: PreTrainedModel,
    drafter: Drafter,
    prompts: Sequence[Mapping[str, Tensor]],
    temperature: float,
    new_tokens: int,
) -> list[KnownText]:
    """The target's own text after each of `prompts` (input_ids (1, P)), decoded with drafts; a prompt's seed is its
    number. Raises ValueError where its scores are NaN."""
    known: dict[int, KnownText] = {}
    with Bar(total=len(prompts), desc="decoding", unit="prompt") as bar:

        def finish(text: Text, new: list[int], failed: bool) -> None:
            if failed:
                raise ValueError("calibration met scores that are NaN; check the model's weights and dtype")
            known[text.seed] = KnownText(text.tokens, new, text.seed)
            bar.update()

        ids = [prompt["input_ids"][0].tolist() for prompt in prompts]
        asked = [Text(tokens, new_tokens, seed, len(tokens) + new_tokens) for seed, tokens in enumerate(ids)]
        tree = MODEST if drafter.traits.fills_dynamic else drafter.default_shape
        how = partial(decode_texts, batch=ROWS, drafter=drafter, tree=tree, executor="eager")
        how(model, asked, finish, temperature=temperature)
    return [known[seed] for seed in range(len(prompts))]


def events_along(
    model: PreTrainedModel,
    drafter: Drafter,
    texts: Sequence[KnownText],
    shape: TreeShape,
    sampling: DraftSampling,
    temperature: float,
) -> list[list[Event]]:
    """For each text, the event of a step with `shape` at every position."""
    events: list[list[Event]] = [[] for _ in texts]
    for first, step in along(model, drafter, texts, shape, sampling, temperature):
        tokens, parents = step.proposal.tokens.tolist(), step.proposal.tree.parents.tolist()
        for row, (alive, path) in enumerate(zip(step.alive, step.path.tolist())):
            if alive:
                text, position = texts[first + row], len(events[first + row])
                accepted = [node for node in path if node >= 0]
                behind = text.new[position + len(accepted) :]
                tree = parents[min(row, len(parents) - 1)]
                events[first + row].append(
                    Event(0, position, tokens[row], tree, accepted, behind[0] if behind else None)
                )
    return events


@torch.no_grad()
def along(
    model: PreTrainedModel,
    drafter: Drafter,
    texts: Sequence[KnownText],
    shape: TreeShape | DynamicShape,
    sampling: DraftSampling,
    temperature: float,
) -> Iterator[tuple[int, Step]]:
    """The steps at all positions of `texts`, some texts at a time: (the number of the first of them, step)."""
    total = sum(len(text.new) for text in texts)
    with Bar(total=total, desc="drafting", unit="position") as bar:
        for first in range(0, len(texts), ROWS):
            for step in _Walk(model, drafter, texts[first : first + ROWS], shape, sampling, temperature).steps():
                yield first, step
                bar.update(sum(step.alive))


class _Walk:
    """A drafter's session that follows some texts, each in a row of its own, token by token."""

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter,
        texts: Sequence[KnownText],
        shape: TreeShape | DynamicShape,
        sampling: DraftSampling,
        temperature: float,
    ):
        rows, device = len(texts), model.device
        whole = [text.prompt + text.new for text in texts]
        longest = max(map(len, whole))
        capacity = -(-(longest + shape.slots + 1) // 64) * 64
        self.text = torch.full((rows, longest + shape.max_depth), NO_TEXT, device=device)  # (B, T + D)
        for row, tokens in enumerate(whole):
            self.text[row, : len(tokens)] = torch.tensor(tokens, device=device)
        nothing = torch.zeros(rows, 0, dtype=torch.long, device=device)
        sampler = Sampler(warpers(temperature), temperature > 0, nothing, nothing.sum(1))
        self.engine: Engine = open_engine(
            SlotModel(model, rows, capacity, drafter.traits.taps), drafter, shape, sampler, sampling, "match", eos=1
        )
        requests = [
            Request(text.prompt, len(text.new), stream_key(text.seed), (), sampler.row_sampling) for text in texts
        ]
        self.engine.state.admit(torch.arange(rows, device=device), requests, [*range(1, rows + 1)])
        self.counts = torch.tensor([len(text.new) for text in texts], device=device)
        self.ends = torch.tensor(list(map(len, whole)), device=device)
        self.chunk, self.features = prompt_chunk(model), None  # type: int, Tensor | None

    def steps(self) -> Iterator[Step]:
        state, session = self.engine.state, self.engine.session
        with Packing(session.packable):
            self._read()
            for number in range(int(self.counts.max())):
                state.done.copy_(number >= self.counts)
                proposal = session.propose(state)
                alive = number < self.counts  # (B,)
                yield Step(alive.tolist(), proposal, self._path(proposal))
                self._advance(alive, proposal)

    def _read(self) -> None:
        """Let the session read the prompts. What a drafter sees of the target's states is read first, of whole texts
        and so with a pass or two over the weights."""
        state, engine = self.engine.state, self.engine
        if engine.target.traits.taps:
            parts = [engine.target.read(span) for span in spans(self.text.clamp(min=0), self.ends, self.chunk)]
            self.features = torch.cat([part for part in parts if part is not None], dim=1)  # (B, T - 1, F)
        for span in spans(state.tokens, state.lengths, self.chunk):
            engine.session.read(span, self._features_at(span.positions.clamp(min=0)))

    def _features_at(self, positions: Tensor) -> Tensor | None:  # (B, n) -> (B, n, F)
        if self.features is None:
            return None
        inside = positions.clamp(max=self.features.shape[1] - 1)
        return self.features.gather(1, inside[..., None].expand(-1, -1, self.features.shape[2]))

    def _path(self, proposal: Proposal) -> Tensor:  # (B, D)
        tree, state = proposal.tree, self.engine.state
        rows, depth = len(proposal.tokens), tree.max_depth
        levels = torch.arange(depth, device=proposal.tokens.device)
        following = self.text.gather(1, (state.lengths[:, None] + levels).clamp(max=self.text.shape[1] - 1))
        following = torch.cat([state.roots(), following], dim=1)  # (B, D+1)
        depths = tree.depths.expand(rows, -1)  # (B, N)
        right = proposal.tokens == following.gather(1, depths)
        paths = tree.paths.expand(rows, -1, -1)  # (B, N, D+1)
        whole = right.gather(1, paths.flatten(1)).view_as(paths).all(-1)  # (B, N)
        last = torch.where(whole, depths, -1).argmax(1)  # (B,)
        path = paths[torch.arange(rows, device=last.device), last, 1:]  # (B, D)
        return torch.where(levels < depths.gather(1, last[:, None]), path, -1)

    def _advance(self, alive: Tensor, proposal: Proposal) -> None:
        """Commit the text's next token, as where a step accepts nothing."""
        state = self.engine.state
        base, spare = state.lengths - 1, state.tokens.shape[1] - 1
        token = self.text.gather(1, state.lengths[:, None]).clamp(min=0)
        state.tokens.scatter_(1, torch.where(alive, state.lengths, spare)[:, None], token)
        state.lengths += alive
        state.committed.copy_(alive)
        path = torch.zeros(len(base), proposal.tree.max_depth + 1, dtype=torch.long, device=base.device)
        features = self._features_at(base[:, None])
        if features is not None:
            features = features.expand(-1, proposal.tree.size, -1)  # those of the root, which alone is committed
        self.engine.session.follow(base, path, alive.long(), features)
