"""Settings of rollouts and of what the teacher is told about them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vpd.config.data import EndpointSettings
from vpd.config.section import Section


class RolloutSettings(Section):
    prompts_per_step: int = Field(default=32, ge=1)
    """Prompts in a rollout batch, over all processes."""
    num_generations: int = Field(default=8, ge=1)
    """N, rollouts of one prompt."""
    max_prompt_length: int = Field(default=2048, ge=1)
    """Limit of the student's prompt; a longer prompt is an error, never cut."""
    max_completion_length: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    """Of the rollouts, and of the student's and teacher's distributions in the losses."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 keeps the whole vocabulary."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    stop_strings: list[str] = Field(default_factory=list)
    """A completion ends with the first of them that it writes."""
    batch_size: int = Field(default=64, ge=1)
    """Sequences decoded at the same time."""
    judge_seconds: float = Field(default=120.0, gt=0)
    """How long to wait for a judgement before its rollout counts as ungraded."""
    max_ungraded_share: float = Field(default=0.5, ge=0, le=1)
    """The run stops where the judge failed on a larger share of a batch's rollouts."""
    next_stage_at: float = Field(default=0.8, gt=0, le=1)
    """Share of successes in a rollout batch at which the next stage of a curriculum begins."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights that sample; ``auto`` makes a bfloat16 copy where the processor computes it natively."""


class Templates(Section):
    """Texts around what the teacher is told; ``{...}`` marks the slots.

    ``prompt`` holds the whole last user message, from ``{prompt}``, ``{solution}`` and ``{feedback}`` sections. A
    critique stands where a solution would.
    """

    prompt: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    solution: str = "\n\nCorrect solution:\n\n{text}"
    critique: str = "\n\nThe following is a critique of your unsuccessful earlier attempt:\n\n{text}"
    feedback_on_failure: str = "\n\nThe following is feedback from your unsuccessful earlier attempt:\n\n{text}"
    feedback_on_success: str = "\n\nThe following is feedback from your successful earlier attempt:\n\n{text}"

    @model_validator(mode="after")
    def _slots(self) -> Templates:
        for name, slots in {
            "prompt": ("{prompt}", "{solution}", "{feedback}"),
            "solution": ("{text}",),
            "critique": ("{text}",),
            "feedback_on_failure": ("{text}",),
            "feedback_on_success": ("{text}",),
        }.items():
            for slot in slots:
                if getattr(self, name).count(slot) != 1:
                    raise ValueError(f"feedback.templates.{name} must hold {slot} exactly once")
        return self


class CritiqueSettings(Section):
    endpoint: EndpointSettings | None = None
    """Who writes the critiques; the network that is trained, by default."""
    max_tokens: int = Field(default=128, ge=1)
    """Of a critique."""
    temperature: float = Field(default=0.7, ge=0)
    """Of the network's own critiques; an endpoint has its own."""


class FeedbackSettings(Section):
    sources: list[str] = Field(default=["sibling", "environment"], min_length=1)
    """In order of preference; each group takes the first that it has: ``environment``, ``sibling``, ``critique``, or a
    class of your own as ``package.module:Class`` (see :mod:`vpd.feedback.sources`)."""
    critique: CritiqueSettings = Field(default_factory=CritiqueSettings)
    """Of the source ``critique``: two or three sentences on each failed attempt."""
    sibling: Literal["first", "shortest"] = "first"
    """Which of a group's successes is shown: the first, or the shortest in tokens. A success that rambles on behind its
    answer teaches not to end, and the next ones ramble longer; the shortest one keeps a run from drifting that way."""
    feedback_only_without_solution: bool = False
    """Where a sibling's solution is shown, leave the environment's text out."""
    max_prompt_length: int = Field(default=10240, ge=1)
    """Limit of the teacher's prompt; only the solution and feedback texts are shortened to meet it."""
    permute: bool = False
    """Control: give each rollout the feedback of another task. Training on it should do clearly worse."""
    templates: Templates = Field(default_factory=Templates)

    @model_validator(mode="after")
    def _names(self) -> FeedbackSettings:
        for name in self.sources:
            if name not in ("environment", "sibling", "critique") and ":" not in name:
                raise ValueError(
                    f"feedback.sources names {name!r}; there are environment, sibling, critique, and classes of your "
                    "own as package.module:Class"
                )
        return self
