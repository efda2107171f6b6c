"""Computes 95% intervals of accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # two-sided 95% of the normal distribution
_RESAMPLES = 2000


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """Compute Wilson's 95% interval of the share of successes among independent yes-or-no outcomes.

    Unlike the normal interval it stays within [0, 1] and is not empty where all outcomes are alike.

    Args:
        successes: How many outcomes are successes.
        count: How many outcomes there are.

    Returns:
        The two ends; (nan, nan) for no outcomes.
    """
    if count == 0:
        return math.nan, math.nan
    share = successes / count
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    return centre - half, centre + half


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Compute the 95% percentile interval of a mean by resampling whole questions.

    The completions of one question are alike. Resampling questions, and not completions, keeps them together.

    Args:
        values: One number for each question.
        seed: The seed of the resampling.

    Returns:
        The two ends; (nan, nan) for no values.
    """
    if not values:
        return math.nan, math.nan
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(array), size=(_RESAMPLES, len(array)))
    return _percentiles(array[picks].mean(axis=1))


def crossed_interval(values: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """Compute the 95% percentile interval of a mean over training seeds and questions by resampling both.

    Each resampling draws S - 1 of the S seeds, so that the resampled means vary as much as the mean itself does (S
    draws would give (S - 1) / S of its variance; Rao and Wu 1988). A single seed has no spread to draw from, and the
    interval is over questions alone.

    Args:
        values: The scores, or the differences of two arms that share seeds and questions, seeds by questions [S, Q].
        seed: The seed of the resampling.

    Returns:
        The two ends; (nan, nan) for no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return math.nan, math.nan
    seeds, questions = array.shape
    draw = np.random.default_rng(seed)
    drawn = max(seeds - 1, 1)
    seed_shares = draw.multinomial(drawn, np.full(seeds, 1 / seeds), size=_RESAMPLES) / drawn
    question_shares = draw.multinomial(questions, np.full(questions, 1 / questions), size=_RESAMPLES) / questions
    return _percentiles(((seed_shares @ array) * question_shares).sum(axis=1))


def _percentiles(means: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
