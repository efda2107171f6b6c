"""Extrapolates along the weights' path (EffOPD, arXiv 2605.11739).

The steps 1, 2, 4, 8, ... try the weights W + 2k (W - W_prev), k = 1 .. 5, where W_prev are the weights of the last such
step, or of the beginning. Each candidate is scored on some training prompts. k grows as long as the score strictly
rises, and the best candidate is kept. A jump forgets the optimizer's moments, which belong to the weights before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vpd.policy.copies import PREVIOUS
from vpd.policy.learner import Learner

_LARGEST = 5


def is_due(step: int) -> bool:
    """Whether ``step``, counted from 1, is a power of two."""
    return step & (step - 1) == 0


@torch.no_grad()
def extrapolate(learner: Learner, score: Callable[[], float]) -> dict[str, float | None]:
    """Move the policy along its path for as long as that helps.

    Args:
        learner: The policy. It has the copy ``PREVIOUS``, which then takes over the policy's new weights.
        score: Measures the policy as it is, the same on all processes.

    Returns:
        The metrics: ``extrapolation``, the k that was kept (0 for none), and the scores before and after.
    """
    previous = learner.copies[PREVIOUS]
    place = {name: value.clone() for name, value in previous.trained(learner.module).items()}
    start = previous.state_dict()
    first = best = score()
    kept = 0
    for k in range(1, _LARGEST + 1):
        _move(learner, place, start, k)
        found = score()
        if not found > best:  # The score is nan where nothing could be graded.
            break
        best, kept = found, k
    _move(learner, place, start, kept)
    if kept:
        learner.optimizer.state.clear()
    previous.assign(learner.module)
    return {"extrapolation": float(kept), "extrapolation_score_before": first, "extrapolation_score_after": best}


def _move(learner: Learner, place: dict[str, torch.Tensor], start: dict[str, torch.Tensor], k: int) -> None:
    for name, parameter in learner.copies[PREVIOUS].trained(learner.module).items():
        parameter.copy_(place[name] + 2 * k * (place[name] - start[name]))
