"""Intervals: coverage on simulated benchmarks, and figures known by hand."""

import numpy as np
import pytest
from paceline.spec.bench.intervals import quotient_interval, ratio_interval, wilson


@pytest.mark.parametrize("prompts", [24, pytest.param(80, marks=pytest.mark.slow)])
def test_the_bootstrap_covers_the_true_speed_up(prompts):
    """1,000 runs: prompts of unequal length and speed, whose times with and without drafter go together."""
    rng = np.random.default_rng(5)
    size = (1000, prompts)
    tokens = rng.integers(8, 65, size)
    machine, gain = rng.lognormal(0, 0.2, size), rng.lognormal(0.7, 0.3, size)
    plain = tokens * 0.05 * machine
    fast = plain / gain * rng.lognormal(0, 0.05, size)
    # E[tokens * machine / gain * noise] factors, so the true ratio of totals is known:
    true = 1 / (np.exp(-0.7 + 0.3**2 / 2) * np.exp(0.05**2 / 2))
    covered = 0
    for a, b, n in zip(plain, fast, tokens):
        interval = quotient_interval([a, n], [n, b], draws=800)
        covered += interval.low <= true <= interval.high
    assert 930 <= covered <= 970


def test_paired_prompts_of_equal_gain_leave_no_doubt():
    seconds = np.array([1.0, 5.0, 0.2, 30.0])
    interval = quotient_interval([2 * seconds, seconds], [seconds, seconds])
    assert (interval.value, interval.low, interval.high) == pytest.approx((2, 2, 2))


def test_an_interval_holds_its_value_and_is_the_same_every_time():
    over, under = [3, 8, 5, 9], [2, 3, 2, 4]
    interval = ratio_interval(over, under)
    assert interval.value == pytest.approx(25 / 11) and interval.low < 25 / 11 < interval.high
    assert interval == ratio_interval(over, under)


def test_one_prompt_has_a_value_and_no_interval():
    interval = ratio_interval([6], [2])
    assert interval.value == pytest.approx(3) and interval.low is interval.high is None


def test_nothing_cannot_be_divided():
    for over, under in (([], []), ([1.0], [0.0])):
        with pytest.raises(ValueError, match="at least one prompt"):
            ratio_interval(over, under)


def test_wilson_is_the_textbook_s():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1 and wilson(0, 0) == (0, 1)
