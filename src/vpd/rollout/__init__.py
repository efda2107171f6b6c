"""Samples completions and has them judged: the engine protocol, the local engine, and the sampler on top of it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from vpd.config import RolloutSettings
from vpd.rollout.engine import RolloutEngine, Sample, SamplingParameters
from vpd.rollout.local import LocalEngine
from vpd.rollout.sampler import RolloutSampler, Sampled

__all__ = [
    "LocalEngine",
    "RolloutEngine",
    "RolloutSampler",
    "Sample",
    "Sampled",
    "SamplingParameters",
    "make_engine",
]


def make_engine(model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: RolloutSettings) -> RolloutEngine:
    """Make the engine that the settings ask for: the :class:`LocalEngine`, which is the only one so far.

    Args:
        model: A causal language model of transformers or PEFT, on its device, without wrappers such as DDP.
        tokenizer: The model's tokenizer.
        settings: The run's settings of rollouts.

    Raises:
        ValueError: The model's forward has been replaced by a wrapper that would still run the original.
    """
    return LocalEngine(model, tokenizer, settings.dtype, settings.batch_size)
