"""The fourth part of a check: is speculation worth it here, and with which tree?

For a drafter whose next token is right with probability a, and whose next guess catches the same share of what is left
(p[rank] = a (1 - a)**rank at every level), the planner looks for the best tree on the curves that were just measured.
Not to speculate is one of its choices.
"""

from collections.abc import Iterator

from ..plan.trees import choose_tree
from .budget import Task, absent, single
from .record import Finding
from .steps import Steps

ACCEPTED = (0.5, 0.7, 0.9)
LEVELS, RANKS = 8, 4


def worth_tasks(steps: Steps) -> Iterator[Task]:
    """One finding for each executor, drafter and acceptance whose times are known."""
    curves = {executor: curve for executor, curve in steps.curves.items() if len(curve) > 1 and 1 in curve}
    if not curves:
        yield absent({"executor": "any"}, "fewer than two sizes of a step were timed")
    for executor, curve in curves.items():
        # Where drafting was not timed with this executor, its costs with eager steps are an upper bound.
        drafts = steps.drafts.get(executor) or steps.drafts.get("eager", {})
        if executor in steps.drafting:
            drafts = {"ngram": {0: 0.0, LEVELS: 0.0}}  # which the steps' own times hold
        for kind, costs in drafts.items():
            for accepted in ACCEPTED:
                what = {"executor": executor, "drafter": kind, "accepted": f"{accepted:.0%}"}
                yield Task(what, single(_best, what, accepted, _rising(curve), costs), short=True)


def _best(what: dict, accepted: float, curve: dict[int, float], costs: dict[int, float]) -> Finding:
    rates = [[accepted * (1 - accepted) ** rank for rank in range(RANKS)]] * LEVELS
    plan = choose_tree(rates, curve, costs)
    figures = {"nodes": len(plan.shape), "depth": plan.shape.max_depth, "tokens_per_step": plan.tokens_per_step}
    figures |= {"speedup": plan.speedup, "token_seconds": plan.seconds_per_step / plan.tokens_per_step}
    reason = "do not speculate" if len(plan.shape) == 1 else ""
    return Finding(what, reason=reason, figures={**figures, "parents": list(plan.parents)})


def _rising(curve: dict[int, float]) -> dict[int, float]:
    """A larger step never costs less; noise may say so."""
    most, rising = 0.0, {}
    for nodes in sorted(curve):
        most = rising[nodes] = max(most, curve[nodes])
    return rising
