"""Losses as pure functions on tensors: shapes in the docstrings, fp32 inside, no config and no state.

They take hidden states and a :class:`Head` in place of logits, since a batch's logits are the largest tensor of a
training step (2,000 tokens x 150,000 words x 4 bytes = 1.2 GB, several times over). They go over the tokens chunk by
chunk, and each chunk's logits are gone before the next chunk's are made. Under autocast in bfloat16 the head's products
round their factors where the device offers it (bfloat16, TF32), as all products of the network do; the logits and
everything made from them stay in fp32.
"""

from vpd.losses.bco import Margin, bco_loss, implicit_rewards, measure_margin
from vpd.losses.divergence import DivergenceKind, TokenLoss, divergence
from vpd.losses.head import DEFAULT_CHUNK_SIZE, Head
from vpd.losses.log_probs import token_log_probs
from vpd.losses.policy_gradient import clipped_policy_gradient, reference_kl, sampled_divergence
from vpd.losses.support import Correction, Support

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "Correction",
    "DivergenceKind",
    "Head",
    "Margin",
    "Support",
    "TokenLoss",
    "bco_loss",
    "clipped_policy_gradient",
    "divergence",
    "implicit_rewards",
    "measure_margin",
    "reference_kl",
    "sampled_divergence",
    "token_log_probs",
]
