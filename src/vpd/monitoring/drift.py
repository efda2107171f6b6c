"""Warnings that no single batch can give: the run drifts away from its beginning, or its teacher has nothing left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

_FIRST = 3
"""The number of batches whose mean stands for the run's beginning."""

_RATE = 0.3
"""The share of the newest batch in the running mean that is compared with the beginning."""

_PLATEAU_FROM = 10
"""The number of batches after which a teacher's margin is judged."""

_LOSS = 0.2
"""How far the share of successes falls before that alone is a collapse."""

_DRIFTS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "truncated_share": (
        "{now:.0%} of the completions are cut off by the length limit, against {first:.0%} at the start",
        lambda first, now: now > first + 0.3,
    ),
    "repetition": (
        "{now:.0%} of the completions' 3-grams repeat, against {first:.0%} at the start",
        lambda first, now: now > first + 0.2,
    ),
    "length_mean": (
        "completions are {now:.0f} tokens long on average, against {first:.0f} at the start",
        lambda first, now: not 0.4 * first <= now <= 2.5 * first,
    ),
    "entropy": (
        "the student's entropy is {now:.2f} nats a token, against {first:.2f} at the start",
        lambda first, now: now > 2 * first + 0.5,
    ),
    "divergence": (
        "student and teacher are {now:.2f} nats a token apart, against {first:.2f} at the start",
        lambda first, now: now > 5 * first + 0.5,
    ),
}


def drift_warnings(history: dict[str, float], metrics: Mapping[str, float | None]) -> dict[str, str]:
    """Return the warnings after one more batch, by name; each cause is told once in a run.

    Args:
        history: Running values of the batches so far, {} at first. It is updated in place, and saved with the run.
        metrics: The batch's metrics.
    """
    causes = []
    # A policy may well change while its rewards rise: it learns to be brief, for example.
    batches, first_rate, rate = _observe(history, "success_rate", metrics.get("success_rate"))
    _, first_reward, reward = _observe(history, "reward", metrics.get("reward"))
    # Where success goes by the group, fewer succeed the more alike the rewards become.
    improves = rate > first_rate or reward > first_reward
    if batches > _FIRST and not improves and rate < first_rate - _LOSS and _once(history, "success_rate"):
        causes.append(f"{rate:.0%} of the rollouts succeed, against {first_rate:.0%} at the start")
    for name, (text, is_drift) in _DRIFTS.items():
        batches, first, now = _observe(history, name, metrics.get(name))
        if batches > _FIRST and not improves and is_drift(first, now) and _once(history, name):
            causes.append(text.format(first=first, now=now))
    warnings = {}
    if causes:
        warnings["collapse"] = (
            f"The policy drifts: {'; '.join(causes)}. Lower optim.learning_rate, or show the shortest success "
            '(feedback.sibling = "shortest"); eval.load_best_model_at_end keeps the best weights.'
        )
    batches, first, now = _observe(history, "margin_on_arrival", metrics.get("margin_on_arrival"))
    if batches >= _PLATEAU_FROM and first > 0 >= now and _once(history, "margin_on_arrival"):
        warnings["plateau"] = (
            f"The teacher no longer tells successes from failures: its margin on fresh rollouts is {now:+.2f}, against "
            f"{first:+.2f} at the start. E-steps refine it: more of them (algorithm.e_step_every), or larger ones "
            "(algorithm.e_learning_rate_factor)."
        )
    return warnings


def forget_beginning(history: dict[str, float]) -> None:
    """Let the next batches stand for the run's beginning in all but the teacher's margin."""
    for key in [key for key in history if not key.startswith("margin_on_arrival.")]:
        del history[key]


def _observe(history: dict[str, float], name: str, value: float | None) -> tuple[int, float, float]:
    """Take in one more value, and return the number of values, the mean of the first ones, and the running mean."""
    batches, first, now = (history.get(f"{name}.{part}", 0.0) for part in ("batches", "first", "now"))
    if value is None or not math.isfinite(value):
        return int(batches), first, now
    batches += 1
    if batches <= _FIRST:
        first += (value - first) / batches
        now = first
    else:
        now += _RATE * (value - now)
    history |= {f"{name}.batches": batches, f"{name}.first": first, f"{name}.now": now}
    return int(batches), first, now


def _once(history: dict[str, float], name: str) -> bool:
    key = f"{name}.told"
    told, history[key] = key in history, 1.0
    return not told
