"""95% intervals for accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # two-sided 95% of the normal distribution
_RESAMPLES = 2000


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of ``count`` independent yes-or-no outcomes.

    Unlike the normal one it stays within [0, 1] and is not empty at 0 or all successes. (nan, nan) for no outcomes.
    """
    if count == 0:
        return math.nan, math.nan
    share = successes / count
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    return centre - half, centre + half


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of the mean, resampling whole entries.

    Args:
        values: one number per question: resampling questions, not completions, keeps completions of one question
            together, which are alike.
        seed: of the resampling.
    """
    if not values:
        return math.nan, math.nan
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(array), size=(_RESAMPLES, len(array)))
    return _percentiles(array[picks].mean(axis=1))


def crossed_interval(values: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of a mean over training seeds and questions, resampling both.

    Of S seeds S - 1 are drawn, which makes the variance of resampled means that of the mean (S drawn ones would give
    (S - 1) / S of it; Rao and Wu 1988). A single seed has no spread to draw from: then the interval is over questions.

    Args:
        values: [S, Q], seeds by questions: scores, or differences of two arms that share seeds and questions.
        seed: of the resampling.

    Returns:
        (nan, nan) for no values.
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
