"""The estimates in an `acceptance.json`: p[depth][rank], the counts behind it, and tokens per step computed from p.

Given counts and a tree; knows neither drafters nor decoding."""

from ..spec.plan.trees import Acceptance, Rates, expected_tokens
from ..spec.tree import TreeShape

WIDTH = 10  # ranks that are counted separately


def record(counts: Acceptance, shape: TreeShape | None) -> dict:
    """`p`, `counts`, and `estimated` tokens per step: with a chain of first guesses, and with `shape` if given."""
    rates = counts.rates()
    return {
        "p": [[round(p, 6) for p in row] for row in rates],
        "counts": {"hits": counts.hits, "trials": counts.trials},
        "estimated": estimates(rates, shape),
    }


def estimates(rates: Rates, shape: TreeShape | None) -> dict:
    chain = TreeShape.chain(len(rates))
    tokens_per_step_of = {"chain": {"depth": len(rates), "tokens_per_step": expected_tokens(rates, chain)}}
    if shape is not None:
        tokens_per_step_of["tree"] = {"parents": list(shape.parents), "tokens_per_step": expected_tokens(rates, shape)}
    return tokens_per_step_of
