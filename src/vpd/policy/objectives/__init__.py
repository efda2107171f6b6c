"""What the policy module computes from its passes: losses and numbers of tokens.

An objective is a plain function of :class:`Forward`: the hidden states [T, H] of the packed tokens, the model's head,
and what the conditioned pass gave where there is one.
"""

from vpd.policy.objectives.base import Forward, Objective, Outputs, ScoredStates, scored_states
from vpd.policy.objectives.distil import Distil
from vpd.policy.objectives.gradient import Imitate, PolicyGradient, WeightedSum
from vpd.policy.objectives.refine import Refine, ShiftRule
from vpd.policy.objectives.scoring import ReadStates, TokenLogProbs

__all__ = [
    "Distil",
    "Forward",
    "Imitate",
    "Objective",
    "Outputs",
    "PolicyGradient",
    "ReadStates",
    "Refine",
    "ScoredStates",
    "ShiftRule",
    "TokenLogProbs",
    "WeightedSum",
    "scored_states",
]
