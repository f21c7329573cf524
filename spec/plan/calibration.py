"""Calibrating drafters on prompts: the replay of each, and the plans by these. Knows no clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..console import Bar
from ..engines.runs import many_scores
from ..proposal import Drafter
from ..stream.streamer import streamer_of
from ..tree import TreeShape
from ..verify import draft_sampling
from .curves import Curves
from .grown import WIDEST, Grown, GrownReplay, plans
from .known_text import KnownText, along, events_along, texts_of
from .replay import BROAD, Replay, follow, plan_by_replay, plan_side_by_side
from .trees import Plan, Rates

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def by_text(model: "PreTrainedModel", rule: str, temperature: float) -> bool:
    """Whether drafters are replayed along texts that are decoded first: where a forward of the target takes seconds,
    and the text alone tells what is accepted."""
    return streamer_of(model) is not None and draft_sampling(rule, temperature > 0).coupling != "own"


def calibrate(
    model: "PreTrainedModel",
    drafter: Drafter,
    prompts: Sequence[dict],
    rule: str,
    temperature: float,
    new_tokens: int,
    texts: Sequence[KnownText] = (),
) -> Replay:
    """Follow the target's text after `prompts` (as `encode` makes them), drafting at every position. `texts` are that
    text, where it is known already.

    Drafters differ by how they draw, so a replay belongs to a rule and a temperature."""
    if by_text(model, rule, temperature):
        texts = texts or texts_of(model, drafter, prompts, temperature, new_tokens)
        drawing = draft_sampling(rule, temperature > 0)
        return Replay(events_along(model, drafter, texts, BROAD, drawing, temperature))
    with Bar(prompts, desc="calibrating", unit="prompt", disable=None if len(prompts) > 1 else True) as bar:
        return Replay(
            [follow(model, drafter, prompt, rule, temperature, new_tokens, seed) for seed, prompt in enumerate(bar)]
        )


def grow_along(
    model: "PreTrainedModel", drafter: Drafter, texts: Sequence[KnownText], rule: str, temperature: float
) -> GrownReplay:
    """Grow the widest dynamic tree at every position of `texts`."""
    drawing = draft_sampling(rule, temperature > 0)
    kept: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in texts]
    for first, step in along(model, drafter, texts, WIDEST, drawing, temperature):
        tree = step.proposal.tree
        columns = [part.cpu() for part in (tree.parents, tree.depths, tree.ranks, step.path)]
        for row, alive in enumerate(step.alive):
            if alive:
                kept[first + row].append(tuple(column[row] for column in columns))
    return GrownReplay([Grown(*(torch.stack(parts) for parts in zip(*steps))) for steps in kept if steps])


@dataclass(frozen=True)
class Calibrated:
    """What a calibration found: the replay and the best plan of each drafter alone, and the best plan of all. Of one
    that grows dynamic trees also the best plan for each number of nodes; and the texts, if they were decoded first."""

    replays: Sequence[Replay | GrownReplay]
    alone: list[Plan]
    plan: Plan
    by_nodes: list[Plan] = field(default_factory=list)
    texts: Sequence[KnownText] = ()

    @property
    def rates(self) -> list[Rates]:
        """p of each drafter by fixed trees: where the plan's steps begin, and of drafters side by side at all
        positions."""
        replays, shape = [replay for replay in self.replays if isinstance(replay, Replay)], TreeShape.chain(0)
        if len(replays) == 1 and isinstance(self.plan.shape, TreeShape):
            shape = self.plan.shape
        return [replay.rates(shape) for replay in replays]

    @property
    def first_guess(self) -> float | None:
        """How often the first guess of the first drafter is right; None where it guessed nothing."""
        replay = self.replays[0]
        if isinstance(replay, GrownReplay):
            return replay.first_guess
        rates = replay.rates(TreeShape.chain(0))
        return rates[0][0] if rates else None


def calibrated(
    model: "PreTrainedModel",
    parts: tuple[Drafter, ...],
    measured: Curves,
    prompts: Sequence[dict],
    rule: str,
    temperature: float,
    new_tokens: int,
    texts: Sequence[KnownText] = (),
) -> Calibrated:
    """The plans for drafters `parts`, from the replay of each on `prompts`."""
    grown, by_nodes = None, []
    if by_text(model, rule, temperature):
        texts = texts or texts_of(model, parts[0], prompts, temperature, new_tokens)
        if parts[0].traits.fills_dynamic:
            grown = grow_along(model, parts[0], texts, rule, temperature)

            def walking(nodes: int) -> float:
                return measured.walking if many_scores(model, 1, nodes, rule, temperature > 0) else 0.0

            by_nodes = plans(grown, measured.target, measured.grown[0], walking)
    dynamic = max([Plan.none(measured.target[1]), *by_nodes], key=lambda plan: plan.speedup)
    if grown is not None and len(parts) == 1:
        return Calibrated([grown], [dynamic], dynamic, by_nodes, texts)
    replays = [calibrate(model, part, prompts, rule, temperature, new_tokens, texts) for part in parts]
    alone = [plan_by_replay(replay, measured.target, costs) for replay, costs in zip(replays, measured.drafts)]
    if grown is not None:  # alone the first would grow its trees, which beside another it does not
        alone[0] = dynamic
    if len(parts) == 1:
        return Calibrated(replays, alone, alone[0], texts=texts)
    both = plan_side_by_side((replays[0], replays[1]), measured.target, measured.drafts)
    return Calibrated(replays, alone, both, texts=texts)
