"""Helpers for rollout engines."""

from __future__ import annotations

from vpd.rollout import RolloutEngine, SamplingParameters


def generate(engine: RolloutEngine, prompts, *, seed=0, as_teacher=False, **parameters):
    """Sample with the parameters given as keywords."""
    return engine.generate(prompts, SamplingParameters(**parameters), seed=seed, as_teacher=as_teacher)
