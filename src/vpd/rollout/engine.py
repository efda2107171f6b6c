"""The protocol of a rollout engine: what it takes and what it gives."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class Sample:
    """One sampled completion.

    Attributes:
        token_ids: The sampled tokens, T of them, the end-of-sequence token included where one was sampled.
        log_probs: The log-probability of each token at the sampling temperature, before top-p, top-k or min-p cut the
            distribution (at temperature 1 when greedy); T of them.
        truncated: Whether the length limit ended the completion, and no end-of-sequence token or stop string did.
    """

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    truncated: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """How completions are drawn.

    Attributes:
        max_new_tokens: The largest number of tokens that a completion may have, at least 1.
        num_generations: How many completions each prompt gets, at least 1.
        temperature: The number that logits are divided by; 0 takes the most likely token.
        top_p: The probability mass that is kept, in (0, 1]; 1 keeps everything.
        top_k: How many of the most likely tokens are kept; 0 keeps all.
        min_p: The smallest probability that is kept, as a share of the largest, in [0, 1); 0 keeps everything.
        stop_strings: A completion ends with the first token after which its text contains one of these.
        eos_token_ids: A completion ends with any of these tokens, which is then a part of it.

    Raises:
        ValueError: One of the numbers is out of its range.
    """

    max_new_tokens: int
    num_generations: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_strings: Sequence[str] = ()
    eos_token_ids: Collection[int] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 1.")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, but it must be 0 (greedy) or above.")
        if "" in self.stop_strings:
            raise ValueError("stop_strings holds an empty string, which every completion contains: remove it.")


class RolloutEngine(Protocol):
    """Samples completions of prompts with the network that is trained.

    Token ids go in and token ids come out: an engine applies no chat template and adds no special token, and what it
    returns is exactly what it sampled. Its log-probabilities go to logs and never into a loss, so that an engine may
    compute in another precision than training does.

    An engine samples from its own copy of the weights, which the trainer brings up to date by :meth:`sync`. An engine
    in another process (a vLLM server) would send the weights there, number them, and check in :meth:`generate` that the
    server has answered with the latest number.
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: SamplingParameters,
        *,
        seed: int,
        as_teacher: bool = False,
    ) -> list[list[Sample]]:
        """Sample ``parameters.num_generations`` completions of each prompt.

        The same weights, prompts, parameters and seed give the same completions. A completion's draws depend on the
        seed, on its prompt's place in ``prompts`` and on its number among the prompt's completions, so that two
        completions never share their draws. No global random state is read or changed.

        Args:
            prompts: The token ids of each prompt, at least one token each.
            parameters: How completions are drawn.
            seed: The seed of the draws, at least 0.
            as_teacher: Whether the teacher's own adapter is on, where the network has one. An engine that serves
                adapters under names of their own takes the teacher's.

        Returns:
            For each prompt, in order, its completions.

        Raises:
            ValueError: A prompt is empty.
        """
        ...

    def sync(self) -> None:
        """Take over the model's current weights; the trainer calls this after optimizer steps.

        Until then :meth:`generate` samples from the weights as they were at the last call, unless :meth:`release` has
        been called in between.
        """
        ...

    def release(self) -> None:
        """Give memory back until the next :meth:`generate`, which takes over the weights as they are then.

        The trainer calls this before its own passes, whose activations need the memory.
        """
        ...
