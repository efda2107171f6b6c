"""Group relative policy optimisation: each rollout's reward against its group's mean, clipped ratios, no teacher.

The reward is centred and by default not scaled, tokens are averaged over the minibatch, and there is no penalty for
leaving the initial model: the settings of VPD's baselines (arXiv 2605.15113).
"""

from __future__ import annotations

from typing import Literal

from vpd.algorithms.policy_step import PolicyGradientAlgorithm
from vpd.config import PolicyGradientSettings


class GRPOSettings(PolicyGradientSettings):
    """Group relative policy optimisation: rewards alone, no teacher."""

    type: Literal["grpo"] = "grpo"  # pyright: ignore[reportIncompatibleVariableOverride]


class GRPO(PolicyGradientAlgorithm[GRPOSettings]):
    """The policy gradient with group-centred advantages."""

    settings_class = GRPOSettings
