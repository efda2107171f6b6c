"""Intervals against published and hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vpd.evaluation.intervals import bootstrap_interval, crossed_interval, wilson_interval
from vpd.evaluation.statistics import repeated_share


def test_wilson_equals_the_published_example():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_wilson_stays_within_zero_and_one_and_is_never_empty():
    low, high = wilson_interval(0, 300)
    assert low == pytest.approx(0, abs=1e-12)
    assert 0 < high < 0.02
    assert all(map(math.isnan, wilson_interval(0, 0)))


def test_the_bootstrap_is_about_as_wide_as_the_normal_interval():
    low, high = bootstrap_interval([0.0, 1.0] * 200)
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)


def test_repetition_counts_the_three_grams_that_came_before():
    assert repeated_share([1, 2, 3, 4, 5]) == 0
    assert repeated_share([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert repeated_share([1, 2]) == 0


def test_crossing_seeds_and_questions_counts_both_spreads():
    draw = np.random.default_rng(1)
    seeds, questions = draw.normal(0, 0.3, size=(12, 1)), draw.normal(0, 1, size=(1, 300))

    def width(values):
        low, high = crossed_interval(values.tolist())
        return high - low

    alone = width(0 * seeds + questions)
    assert alone == pytest.approx(2 * 1.96 * questions.std() / math.sqrt(300), rel=0.1)
    assert width(seeds + 0 * questions) == pytest.approx(2 * 1.96 * seeds.std() / math.sqrt(12), rel=0.15)
    assert width(seeds + questions) == pytest.approx(math.hypot(alone, width(seeds + 0 * questions)), rel=0.1)
