"""What is timed: workloads, the two sides' settings, and what a timed step reports. No heavy imports: the parent
process, which only gives the beat, stays small."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Precision: TypeAlias = Literal["autocast", "float32", "bfloat16"]
"""``autocast``: float32 weights with bfloat16 matrix products; the others hold and compute everything in one dtype."""

Algorithm: TypeAlias = Literal["sdpo", "grpo", "vpd"]

LEARNING_RATE = 1e-7
"""Tiny, so that the policy stays what it is; not zero, so that no side may skip its update."""


@dataclass(frozen=True)
class Workload:
    """Prompts and completions of one step.

    Attributes:
        prompt_tokens: length of the student's prompt, chat template included.
        completion_tokens: of every completion, exactly.
        num_generations: N.
        prompts: of one step.
        system_words: a token each, of a system message that all prompts begin with; 0 for the template's own.
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
"""(a) multiple-choice science questions, (b) short answers, (c) long completions; ``tiny`` tries the harness out.

``a-system`` is (a) with a system message: 96 of a prompt's 250 tokens are the same in all, as 111 of about 300 are in
SciKnowEval's chemistry questions. In (a) itself only the template's 26 are.
"""


@dataclass(frozen=True)
class Side:
    """One trainer in one configuration; each runs in a process of its own.

    Attributes:
        library: whose trainer.
        algorithm: ``sdpo`` with a live teacher, ``grpo``, or ``vpd`` (ours alone).
        model: a name for ``load_policy``, or ``random-SIZE`` with an optional ``-VOCABULARY``: see ``models.py``.
        precision: of weights and matrix products.
        gradient_checkpointing: recompute activations in the backward pass.
        micro_batch: TRL's rows per forward pass; None for all rollouts of the step.
        cache: TRL's ``cache_implementation`` in generation; None for transformers' default.
        overrides: our further settings, as ``section.key=value``.
        share_prefixes: ours: compute common prefixes once in training passes.
        threads: of torch.
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
    """What a side says of itself before its first step.

    Attributes:
        idle_bytes: resident memory with everything imported and nothing loaded.
        static_bytes: weights, gradients and the two moments of AdamW, of the trained network.
        parameters: of the network.
        versions: of the libraries.
    """

    idle_bytes: int
    static_bytes: int
    parameters: int
    versions: dict[str, str]


@dataclass
class StepRecord:
    """One timed step.

    Attributes:
        seconds: of all of it.
        phases: seconds of its parts.
        peak_bytes: largest resident memory within the step.
        tokens_computed: positions that went through the network in training passes, padding included; those that
            checkpointing computes again in the backward pass are not counted twice.
        tokens_needed: distinct prefix tokens of the students' sequences, plus those of the teachers'.
        tokens_needed_jointly: the same of both in one, for a teacher pass that shares the question with the student's.
        tokens_sampled: of the completions.
        rollouts: that took part in the update.
        divergence: mean over completion tokens, where the algorithm has one: both sides must say about the same.
        e_step: whether an E-step really ran.
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
