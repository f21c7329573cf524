"""Uncertainty of benchmark figures: a paired bootstrap over prompts, and Wilson's interval for counts.

Steps of one prompt are correlated, so prompts are what is drawn, the same ones for a method and its baseline. Knows
nothing of where the numbers come from.
"""

import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_Z = 1.959964  # of the normal law at that level


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and where the true value lies at 95 %; the bounds are None where one prompt is all there is."""

    value: float
    low: float | None
    high: float | None


def ratio_interval(over, under, draws: int = 10_000, seed: int = 0) -> Interval:
    """sum(over) / sum(under) of paired sums over prompts, (P,) each: a rate, tokens per step, seconds per token."""
    return quotient_interval([over], [under], draws, seed)


def quotient_interval(over: list, under: list, draws: int = 10_000, seed: int = 0) -> Interval:
    """The product of sums of `over` by that of `under`, all (P,) over the same prompts.

    Over a baseline's seconds and a method's tokens, under the baseline's tokens and the method's seconds, that is the
    speed-up. Percentiles of the logarithm's bootstrap law, widened by what P prompts understate the spread: Student's
    t for the normal law, and sqrt(P / (P - 1)) (Hesterberg 2015, "What teachers should know about the bootstrap").
    Raises ValueError where there is no prompt or a sum is not above 0."""
    sums = np.stack([np.asarray(x, float) for x in (*over, *under)], axis=1)  # (P, over + under)
    if not len(sums) or (sums.sum(0) <= 0).any():
        raise ValueError("a ratio needs at least one prompt, and sums above 0 on both sides")
    signs = np.array([1.0] * len(over) + [-1.0] * len(under))
    value = float(np.exp(np.log(sums.sum(0)) @ signs))
    if len(sums) == 1:
        return Interval(value, None, None)
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([_draw(rng, sums, n) for n in _blocks(draws, len(sums))])  # (draws, over + under)
    law = np.log(drawn[(drawn > 0).all(1)]) @ signs
    share = _widened(len(sums))
    low, high = np.exp(np.quantile(law, [share, 1 - share]))
    return Interval(value, float(low), float(high))


def _blocks(draws: int, prompts: int) -> list[int]:
    """How many draws at a time: about 16 MB of prompt numbers."""
    size = max(1, 2_000_000 // prompts)
    return [min(size, draws - start) for start in range(0, draws, size)]


def _draw(rng, sums: np.ndarray, draws: int) -> np.ndarray:
    """Sums over as many prompts drawn with replacement."""
    counts = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)  # (draws, P)
    return counts @ sums


def _widened(prompts: int) -> float:
    """The tail left out on each side, below 2.5 %."""
    df = prompts - 1
    t = _Z + (_Z**3 + _Z) / (4 * df) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * df**2)  # Cornish-Fisher
    return 0.5 * math.erfc(t * math.sqrt(prompts / df) / math.sqrt(2))


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval for a proportion of independent trials; (0, 1) where there are none."""
    if not trials:
        return 0.0, 1.0
    rate, spread = hits / trials, _Z**2 / trials
    middle = (rate + spread / 2) / (1 + spread)
    reach = _Z / (1 + spread) * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials))
    return max(0.0, middle - reach), min(1.0, middle + reach)
