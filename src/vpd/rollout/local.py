"""Samples completions with the network itself, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from vpd.device import computes_bfloat16
from vpd.rollout.decoding import Decoder
from vpd.rollout.engine import Sample, SamplingParameters
from vpd.rollout.inference_copy import InferenceCopy
from vpd.rollout.sampling import TokenSampler, sequence_uniforms
from vpd.rollout.stopping import StopCondition


class LocalEngine:
    """The rollout engine (:class:`vpd.rollout.engine.RolloutEngine`) that samples in this process.

    It samples from an :class:`InferenceCopy` of the model with a :class:`Decoder`. On a CPU, where the model can be
    packed, a beginning that prompts of a batch share, such as a system message, is computed once.

    Args:
        model: A causal language model of transformers or PEFT, on its device, without wrappers such as DDP.
        tokenizer: Decodes completions in search of stop strings.
        dtype: ``bfloat16`` samples from a bfloat16 copy of wider weights, ``float32`` from the model's own, and
            ``auto`` makes the copy where the CPU computes bfloat16 natively.
        batch_size: How many sequences are decoded at the same time.

    Raises:
        ValueError: The model's forward has been replaced by a wrapper that would still run the original.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        batch_size: int = 64,
    ):
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._device = next(model.parameters()).device
        if dtype == "auto":
            dtype = "bfloat16" if computes_bfloat16(self._device) else "float32"
        self._copy = InferenceCopy(model, bfloat16=dtype == "bfloat16")
        self._decoder = Decoder(self._copy.network)

    def sync(self) -> None:
        """Take over the model's current weights and buffers.

        Raises:
            RuntimeError: The model has other parameters or buffers than it had when the engine was made.
        """
        self._copy.sync()

    def release(self) -> None:
        """Free the copies of the weights; the next :meth:`generate` makes them from the weights as they are then."""
        self._copy.release()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: SamplingParameters,
        *,
        seed: int,
        as_teacher: bool = False,
    ) -> list[list[Sample]]:
        """Sample completions as :meth:`vpd.rollout.engine.RolloutEngine.generate` says.

        The batch that a sequence is in changes its log-probabilities by rounding alone.
        """
        if empty := [index for index, prompt in enumerate(prompts) if not prompt]:
            raise ValueError(f"Prompt {empty[0]} is empty: sampling needs at least one token to start from.")
        sampler = TokenSampler(parameters.temperature, parameters.top_p, parameters.top_k, parameters.min_p)
        stop = StopCondition(self._tokenizer, parameters.eos_token_ids, parameters.stop_strings)
        if self._copy.is_released:
            self.sync()
        samples: dict[tuple[int, int], Sample] = {}
        with self._copy.as_teacher(as_teacher):
            for chunk in self._chunks(prompts, parameters.num_generations):
                uniforms = [sequence_uniforms(seed, *sequence, parameters.max_new_tokens) for sequence in chunk]
                completions = self._decoder.decode(
                    [tuple(prompts[prompt]) for prompt, _ in chunk],
                    torch.stack(uniforms, dim=1).to(self._device),
                    sampler,
                    stop,
                )
                samples.update(zip(chunk, completions, strict=True))
        generations = range(parameters.num_generations)
        return [[samples[prompt, generation] for generation in generations] for prompt in range(len(prompts))]

    def _chunks(self, prompts: Sequence[Sequence[int]], num_generations: int) -> Iterator[list[tuple[int, int]]]:
        """Split the sequences (prompt, generation) into batches, in whole groups where these fit.

        Prompts of like length come together, which saves padding, and equal prompts too, which are computed once.
        """
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), list(prompts[index])))
        if self._decoder.pads:
            blocks = [[(index, generation) for index in order for generation in range(num_generations)]]
        else:
            blocks = [[(index, generation) for generation in range(num_generations)] for index in order]
        whole_groups = self._batch_size // num_generations * num_generations
        size = whole_groups or self._batch_size
        for block in blocks:
            for start in range(0, len(block), size):
                yield block[start : start + size]
