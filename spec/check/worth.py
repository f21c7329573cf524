"""The fourth part of a check: is speculation worth it here, and with which tree?

For drafters with p[rank] = a (1 - a)**rank at every level (the first guess is right with probability a, and each
further one with probability a if those before it were wrong), the planner finds the best tree for the step times just
measured. Not to speculate is one of its choices.
"""

from collections.abc import Iterator

from ..plan.trees import choose_tree
from ..tree import TreeShape
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
            drafts = {"ngram": {0: 0.0, LEVELS: 0.0}}  # the step times include it
        for kind, costs in drafts.items():
            for accepted in ACCEPTED:
                labels = {"executor": executor, "drafter": kind, "accepted": f"{accepted:.0%}"}
                yield Task(labels, single(_best, labels, accepted, _rising(curve), costs), short=True)


def _best(labels: dict, accepted: float, curve: dict[int, float], costs: dict[int, float]) -> Finding:
    rates = [[accepted * (1 - accepted) ** rank for rank in range(RANKS)]] * LEVELS
    plan = choose_tree(rates, curve, costs)
    assert isinstance(plan.shape, TreeShape), "p is of fixed trees"
    figures = {"nodes": len(plan.shape), "depth": plan.shape.max_depth, "tokens_per_step": plan.tokens_per_step}
    figures |= {"speedup": plan.speedup, "token_seconds": plan.seconds_per_step / plan.tokens_per_step}
    reason = "do not speculate" if len(plan.shape) == 1 else ""
    return Finding(labels, reason=reason, figures={**figures, "parents": list(plan.shape.parents)})


def _rising(curve: dict[int, float]) -> dict[int, float]:
    """`curve` made non-decreasing: a larger step never costs less, except by noise."""
    most, rising = 0.0, {}
    for nodes in sorted(curve):
        most = rising[nodes] = max(most, curve[nodes])
    return rising
