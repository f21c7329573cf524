"""Calibration: acceptance at every position of the target's own text, and the replay of decoding with any tree.

p counted in the steps of one tree is biased for another: a deep tree skips easy positions, so that its steps begin at
hard ones. Therefore the text is decoded one token per step while a wide tree is drafted at every position; from this,
decoding with any tree contained in the wide one can be replayed. Knows no clock.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engines.executors import Eager
from ..engines.runs import open_engine
from ..noise import stream_key
from ..proposal import Drafter
from ..request import Request
from ..rows import Rows
from ..sampling import Sampler, warpers
from ..stream.streamer import prompt_chunk
from ..target.load import end_ids
from ..target.slots import SlotModel
from ..trace import Event
from ..tree import TreeShape
from ..verify import draft_sampling
from .trees import Acceptance, Plan, Rates, choose_tree, depth_within, grow, interpolate

# A rough guess at p[depth][rank], for which the wide calibration tree is planned; and for streamed targets, by whose
# trees more is to be had, one in which drafts that were right so far go on being right.
_PRIOR = [[0.65 * 0.4**rank for rank in range(8)] for _ in range(8)]
WIDE = TreeShape(tuple(grow(_PRIOR, 48, 8)[0]))
BROAD = TreeShape(tuple(grow([*_PRIOR[:3], *[[0.85, 0.1, 0.05]] * 13], 256, 16)[0]))
ROUNDS = 6  # rounds in which p is counted where the last plan's steps begin, and a tree is planned again


@dataclass(frozen=True)
class Replay:
    """For each text, one event per position: the wide tree drafted there and the whole path of it that would have been
    accepted."""

    texts: list[list[Event]]

    def walk(self, shape: TreeShape) -> list[Event]:
        """The events of the positions at which decoding with `shape` begins its steps."""
        return [
            events[position]
            for events in self.texts
            for position in step_positions(len(events), partial(_accepted, events, shape))
        ]

    def reach(self, shape: TreeShape) -> list[list[int]]:
        """How many drafted tokens a step with `shape` would accept, at all positions of each text."""
        return [[_accepted(events, shape, position) for position in range(len(events))] for events in self.texts]

    def tokens_per_step(self, shape: TreeShape) -> float:
        return sum(map(len, self.texts)) / len(self.walk(shape))

    def rates(self, shape: TreeShape) -> Rates:
        """p[depth][rank] counted at the positions where steps with `shape` begin."""
        return Acceptance.of(self.walk(shape)).rates()


def _accepted(events: list[Event], shape: TreeShape, position: int) -> int:
    return depth_within(_ranks(events[position]), shape)


def step_positions(length: int, reach: Callable[[int], int]) -> Iterator[int]:
    """The positions of a text of `length` tokens at which decoding begins its steps; a step that begins at a position
    has `reach(position)` drafted tokens accepted."""
    position = 0
    while position < length:
        yield position
        position += 1 + reach(position)


def _ranks(event: Event) -> Iterator[int]:
    """The ranks of the accepted nodes among their siblings."""
    parent = 0
    for node in event.accepted:
        yield event.parents[:node].count(parent)  # elder siblings
        parent = node


def plan_by_replay(replay: Replay, target_seconds: dict[int, float], draft_seconds: dict[int, float]) -> Plan:
    """The tree with the least time per token in the replay; not to speculate is one of the choices.

    A tree is planned with p of all positions, then again with p of the positions where the planned tree's steps begin,
    and so on until a tree comes up again."""
    plain = target_seconds[1]
    shape, best, seen = TreeShape.chain(0), Plan.none(plain), set()
    for _ in range(ROUNDS):
        planned = choose_tree(replay.rates(shape), target_seconds, draft_seconds)
        assert isinstance(planned.shape, TreeShape), "p is of fixed trees"
        shape = planned.shape
        if shape in seen or len(shape) == 1:
            break
        seen.add(shape)
        replayed = Plan.of(shape, replay.tokens_per_step(shape), planned.seconds_per_step, plain)
        best = max(best, replayed, key=lambda plan: plan.speedup)
    return best


def plan_side_by_side(
    replays: tuple[Replay, Replay], target_seconds: dict[int, float], draft_seconds: tuple[dict[int, float], ...]
) -> Plan:
    """The best tree for two drafters side by side, the second of which drafts a chain. Every tree of the first drafter
    that `grow` gives is replayed with every length of the chain. Not to speculate is one of the choices; one drafter
    alone is not."""
    first, second = aligned(replays)
    plain, depths, most = target_seconds[1], [max(curve) for curve in draft_seconds], max(target_seconds)
    parents, _ = grow(first.rates(TreeShape.chain(0)), most - 1, depths[0])
    chains = [(TreeShape.chain(length), second.reach(TreeShape.chain(length))) for length in range(1, depths[1] + 1)]
    best = Plan.none(plain)
    for size in range(2, len(parents) + 1):
        tree = TreeShape(tuple(parents[:size]))
        reach = first.reach(tree)
        for chain, copied in chains[: most - size]:
            shape = tree.beside(chain)
            seconds = interpolate(target_seconds, len(shape))
            seconds += sum(interpolate(curve, part.max_depth) for curve, part in zip(draft_seconds, (tree, chain)))
            tokens, steps = walk_together(reach, copied)
            best = max(best, Plan.of(shape, tokens / steps, seconds, plain), key=lambda plan: plan.speedup)
    return best


def aligned(replays: tuple[Replay, Replay]) -> tuple[Replay, Replay]:
    """Both replays, each text cut where the two differ, as they may at near-ties in low precision."""
    cut: tuple[list, list] = [], []
    for pair in zip(*(replay.texts for replay in replays)):
        same = (text.tokens[0] == twin.tokens[0] for text, twin in zip(*pair))
        length = sum(itertools.takewhile(bool, same))
        for kept, events in zip(cut, pair):
            kept.append(events[:length])
    return Replay(cut[0]), Replay(cut[1])


def walk_together(first: list[list[int]], second: list[list[int]]) -> tuple[int, int]:
    """Tokens and steps of decoding with two drafters, from the accepted tokens of each at every position."""
    count = 0
    for first_text, second_text in zip(first, second, strict=True):
        farther = [max(pair) for pair in zip(first_text, second_text, strict=True)]
        count += sum(1 for _ in step_positions(len(farther), farther.__getitem__))
    return sum(map(len, first)), count


@torch.no_grad()
def follow(
    model: PreTrainedModel,
    drafter: Drafter,
    prompt: Mapping[str, Tensor],
    rule: str,
    temperature: float,
    new_tokens: int,
    seed: int,
) -> list[Event]:
    """Decode `prompt` (input_ids (1, P)) one token a step, up to `new_tokens` or an end of text, drafting the wide
    tree at each."""
    ids = prompt["input_ids"].to(model.device)
    ends = tuple(end_ids(model))
    sampler = Sampler(warpers(temperature), temperature > 0, ids, ids.new_zeros(1))
    drawing = draft_sampling(rule, temperature > 0)
    capacity = -(-(ids.shape[1] + new_tokens + len(WIDE) + 1) // 64) * 64
    target = SlotModel(model, 1, capacity, drafter.traits.taps)
    engine = open_engine(target, drafter, WIDE, sampler, drawing, rule, len(ends))
    rows, events = Rows(Eager(engine), prompt_chunk(model)), []
    rows.admit({0: Request(ids[0].tolist(), 1, stream_key(seed), ends, sampler.row_sampling)})
    while True:
        arrival = rows.step()
        report = arrival.reports[0]
        if report.failed:
            raise ValueError("calibration met scores that are NaN; check the model's weights and dtype")
        accepted = report.path[1 : report.accepted + 1]
        events.append(Event(0, arrival.number, report.tokens, report.parents, accepted, report.bonus))
        if len(events) == new_tokens or int(rows.engine.state.roots()[0, 0]) in ends:
            return events
        rows.extend(0, 1)
