"""Calibrating drafters on prompts: the replay of each, and the plans by these. Knows no clock."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..console import Bar
from ..proposal import Drafter
from ..tree import TreeShape
from .curves import Curves
from .replay import Replay, follow, plan_by_replay, plan_side_by_side
from .trees import Plan, Rates

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def calibrate(
    model: "PreTrainedModel", drafter: Drafter, prompts: list[dict], rule: str, temperature: float, new_tokens: int
) -> Replay:
    """Follow the target's text after `prompts` (as `encode` makes them), drafting at every position.

    Drafters differ by how they draw, so a replay belongs to a rule and a temperature."""
    with Bar(prompts, desc="calibrating", unit="prompt", disable=None if len(prompts) > 1 else True) as bar:
        return Replay(
            [follow(model, drafter, prompt, rule, temperature, new_tokens, seed) for seed, prompt in enumerate(bar)]
        )


@dataclass(frozen=True)
class Calibrated:
    """What a calibration found: the replay and the best plan of each drafter alone, and the best plan of all."""

    replays: list[Replay]
    alone: list[Plan]
    plan: Plan

    @property
    def rates(self) -> list[Rates]:
        """p of each drafter: where the plan's steps begin, and of drafters side by side at all positions."""
        shape = self.plan.shape if len(self.replays) == 1 else TreeShape.chain(0)
        return [replay.rates(shape) for replay in self.replays]


def calibrated(
    model: "PreTrainedModel",
    parts: tuple[Drafter, ...],
    measured: Curves,
    prompts: list[dict],
    rule: str,
    temperature: float,
    new_tokens: int,
) -> Calibrated:
    """The plans for drafters `parts`, from the replay of each on `prompts`."""
    replays = [calibrate(model, part, prompts, rule, temperature, new_tokens) for part in parts]
    alone = [plan_by_replay(replay, measured.target, costs) for replay, costs in zip(replays, measured.drafts)]
    best = alone[0]
    if len(parts) > 1:
        best = plan_side_by_side((replays[0], replays[1]), measured.target, measured.drafts)
    return Calibrated(replays, alone, best)
