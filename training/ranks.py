"""Label ranks: how a drafter ranks the tokens of a text; accuracy and tokens per step computed from them.

`ranks[i, d]` (n, D) is the number of tokens that the drafter holds more likely at position i and depth d than the token
of the text, given the text before. With them greedy decoding can be replayed with any tree; for the target's own greedy
text the replay takes exactly the steps of real decoding. Knows no files.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..drafters.kinds import KINDS
from ..spec.plan.replay import step_positions
from ..spec.plan.trees import depth_within
from ..spec.tree import TreeShape
from .objectives.objective import NO_LABEL, Judge


def judge_of(drafter, model, depths: int) -> Judge | None:
    """The function that computes label ranks of `drafter` for the target `model`, from the objective of its kind; for
    heads, D is the number of heads. None for drafters that can be evaluated by decoding only."""
    kind = KINDS.get(drafter.traits.kind)
    return kind.objective_class().judge(drafter, model, depths) if kind and kind.objective else None


def spans(ranks: Tensor, judged: Tensor) -> list[Tensor]:
    """Split `ranks` (n, D), a row per True of `judged` (B, T), into one tensor (m, D) per run of adjacent positions."""
    rows, columns = judged.nonzero(as_tuple=True)
    cuts = ((rows.diff() != 0) | (columns.diff() != 1)).nonzero()[:, 0] + 1
    return [part.cpu() for part in ranks.tensor_split(cuts.cpu()) if len(part)]


def accuracies(label_ranks: Iterable[Tensor], depths: int) -> tuple[list[int], list[int]]:
    """For each depth, over `label_ranks`, the number of labels that were the first guess, and of all labels."""
    right, judged = torch.zeros(depths, dtype=torch.int64), torch.zeros(depths, dtype=torch.int64)
    for ranks in label_ranks:
        right += (ranks == 0).sum(0).cpu()
        judged += (ranks != NO_LABEL).sum(0).cpu()
    return right.tolist(), judged.tolist()


def walk(label_ranks: Iterable[Tensor], shape: TreeShape) -> tuple[int, int]:
    """Replay greedy decoding with tree `shape` over answers' `label_ranks`, (m, D) each: counts of steps and tokens."""
    steps = tokens = 0
    for ranks in label_ranks:
        reach = [depth_within(row, shape) for row in ranks.tolist()]
        steps += sum(1 for _ in step_positions(len(reach), reach.__getitem__))
        tokens += len(reach)
    return steps, tokens
