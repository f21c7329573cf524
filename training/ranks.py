"""Where the text's own tokens stand in a drafter's ranking, and what decoding would make of them.

Label ranks (n, D) say, place by place, how many tokens the drafter holds more likely than the one that follows, and
than the next, given the text before. From them come p[depth][rank], the accuracy of each depth, and an exact replay
of greedy decoding with any tree: where the text is the target's own greedy text, the same steps. Knows no files.
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
    """What ranks the tokens of a text by `drafter` for the target `model`, as the objective of its kind does it; heads
    give as many depths as they are. None for a drafter that nothing but decoding can judge."""
    kind = KINDS.get(drafter.traits.kind)
    return kind.objective_class().judge(drafter, model, depths) if kind and kind.objective else None


def spans(ranks: Tensor, judged: Tensor) -> list[Tensor]:
    """Cut the ranks (n, D) of the true places of `judged` (B, T) into runs of neighbours, (m, D) each: the answers."""
    rows, columns = judged.nonzero(as_tuple=True)
    cuts = ((rows.diff() != 0) | (columns.diff() != 1)).nonzero()[:, 0] + 1
    return [part.cpu() for part in ranks.tensor_split(cuts.cpu()) if len(part)]


def accuracies(found: Iterable[Tensor], depths: int) -> tuple[list[int], list[int]]:
    """Of how many labels at each depth the drafter's first guess was right, the text before being given."""
    right, judged = torch.zeros(depths, dtype=torch.int64), torch.zeros(depths, dtype=torch.int64)
    for ranks in found:
        right += (ranks == 0).sum(0).cpu()
        judged += (ranks != NO_LABEL).sum(0).cpu()
    return right.tolist(), judged.tolist()


def walk(found: Iterable[Tensor], shape: TreeShape) -> tuple[int, int]:
    """The steps that greedy decoding with this tree takes over answers (m, D) each, and the tokens that they bring."""
    steps = tokens = 0
    for ranks in found:
        reach = [depth_within(row, shape) for row in ranks.tolist()]
        steps += sum(1 for _ in step_positions(len(reach), reach.__getitem__))
        tokens += len(reach)
    return steps, tokens
