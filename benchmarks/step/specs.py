"""The workloads, the settings of the two sides, and the report of a timed step.

This module imports nothing heavy, so that the parent process, which only hands out turns, stays small.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Precision: TypeAlias = Literal["autocast", "float32", "bfloat16"]
"""``autocast`` has float32 weights and bfloat16 matrix products; the others hold and compute all in one dtype."""

Algorithm: TypeAlias = Literal["sdpo", "grpo", "vpd"]

LEARNING_RATE = 1e-7
"""A tiny rate, so that the policy stays as it is; it is not zero, so that no side may skip its update."""


@dataclass(frozen=True)
class Workload:
    """The prompts and completions of one step.

    Attributes:
        prompt_tokens: The length of the student's prompt, with the chat template.
        completion_tokens: The exact length of every completion.
        num_generations: The group size N.
        prompts: The number of prompts in one step.
        system_words: The number of words, with one token each, of a system message that all prompts begin with; 0 takes
            the template's own.
    """

    prompt_tokens: int
    completion_tokens: int
    num_generations: int
    prompts: int
    system_words: int = 0

    @property
    def rollouts(self) -> int:
        return self.prompts * self.num_generations


WORKLOADS = {
    "a": Workload(prompt_tokens=250, completion_tokens=16, num_generations=8, prompts=4),
    "a-system": Workload(prompt_tokens=250, completion_tokens=16, num_generations=8, prompts=4, system_words=85),
    "b": Workload(prompt_tokens=60, completion_tokens=4, num_generations=8, prompts=8),
    "c": Workload(prompt_tokens=150, completion_tokens=256, num_generations=4, prompts=2),
    "tiny": Workload(prompt_tokens=50, completion_tokens=4, num_generations=2, prompts=2),
}
"""The workloads: (a) stands for multiple-choice science questions, (b) for short answers, (c) for long completions, and
``tiny`` tries the harness out.

``a-system`` is (a) with a system message: 96 of a prompt's 250 tokens are the same in all prompts, as are 111 of about
300 in SciKnowEval's chemistry questions. In (a) itself only the template's 26 tokens are the same.
"""


@dataclass(frozen=True)
class Side:
    """One trainer in one configuration; each side runs in a process of its own.

    Attributes:
        library: The library whose trainer it is.
        algorithm: ``sdpo`` with a live teacher, ``grpo``, or ``vpd`` (ours alone).
        model: A name for ``load_policy``, or ``random-SIZE`` with an optional ``-VOCABULARY`` (see ``models.py``).
        precision: The precision of weights and matrix products.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        micro_batch: TRL's rows per forward pass; None takes all rollouts of the step.
        cache: TRL's ``cache_implementation`` in generation; None takes transformers' default.
        overrides: Further settings of ours, as ``section.key=value``.
        share_prefixes: Whether our training passes compute common prefixes once.
        threads: The number of torch's threads.
    """

    library: Literal["ours", "trl"]
    algorithm: Algorithm = "sdpo"
    model: str = "smollm2-135m-instruct"
    precision: Precision = "autocast"
    gradient_checkpointing: bool = False
    micro_batch: int | None = None
    cache: str | None = None
    overrides: tuple[str, ...] = ()
    share_prefixes: bool = True
    threads: int = 2

    @property
    def label(self) -> str:
        parts = [self.library, self.algorithm, self.precision]
        if self.library == "trl":
            parts.append(f"micro-batch {self.micro_batch or 'all'}")
            parts += [f"{self.cache} cache"] if self.cache else []
        parts += ["checkpointing"] if self.gradient_checkpointing else []
        parts += [] if self.share_prefixes else ["unshared"]
        return " ".join([*parts, *self.overrides])


@dataclass(frozen=True)
class SideInfo:
    """A side's description of itself before its first step.

    Attributes:
        idle_bytes: The resident memory with everything imported and nothing loaded.
        static_bytes: The bytes of the network's weights, gradients and two AdamW moments.
        parameters: The number of the network's parameters.
        versions: The libraries' versions.
    """

    idle_bytes: int
    static_bytes: int
    parameters: int
    versions: dict[str, str]


@dataclass
class StepRecord:
    """The report of one timed step.

    Attributes:
        seconds: The time of the whole step.
        phases: The seconds of its parts.
        peak_bytes: The largest resident memory within the step.
        tokens_computed: How many positions went through the network in training passes, with padding. Positions that
            checkpointing recomputes in the backward pass count once.
        tokens_needed: How many distinct prefix tokens the students' sequences have, plus those of the teachers'.
        tokens_needed_jointly: How many distinct prefix tokens both have together; a teacher pass that reuses the
            question's keys and values from the student's pass needs no more.
        tokens_sampled: How many tokens the completions have.
        rollouts: How many rollouts took part in the update.
        divergence: The mean over completion tokens, where the algorithm has one; both sides must report about the same.
        e_step: Whether an E-step really ran.
    """

    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    tokens_computed: int = 0
    tokens_needed: int = 0
    tokens_needed_jointly: int = 0
    tokens_sampled: int = 0
    rollouts: int = 0
    divergence: float | None = None
    e_step: bool = False
