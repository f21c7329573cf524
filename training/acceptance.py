"""What an `acceptance.json` begins with: p[depth][rank], the counts that it comes from, and what it promises.

Knows neither drafters nor decoding."""

from ..spec.plan.trees import Acceptance, Rates, expected_tokens
from ..spec.tree import TreeShape

WIDTH = 10  # ranks that are told apart


def record(counts: Acceptance, shape: TreeShape | None) -> dict:
    """`p`, `counts`, and `estimated` tokens per step: of a chain of first guesses, and of the tree, where it is one."""
    rates = counts.rates()
    return {
        "p": [[round(p, 6) for p in row] for row in rates],
        "counts": {"hits": counts.hits, "trials": counts.trials},
        "estimated": estimates(rates, shape),
    }


def estimates(rates: Rates, shape: TreeShape | None) -> dict:
    chain = TreeShape.chain(len(rates))
    found = {"chain": {"depth": len(rates), "tokens_per_step": expected_tokens(rates, chain)}}
    if shape is not None:
        found["tree"] = {"parents": list(shape.parents), "tokens_per_step": expected_tokens(rates, shape)}
    return found
