"""The settings of rollouts, and of the feedback that the teacher reads about them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vpd.config.data import EndpointSettings
from vpd.config.section import Section


class RolloutSettings(Section):
    """How completions are sampled from the student and judged."""

    prompts_per_step: int = Field(default=32, ge=1)
    """The number of prompts in a rollout batch, over all processes."""
    num_generations: int = Field(default=8, ge=1)
    """The number of rollouts of one prompt (the group size N)."""
    max_prompt_length: int = Field(default=2048, ge=1)
    """The length limit of the student's prompt, in tokens; a longer prompt is an error and is never cut."""
    max_completion_length: int = Field(default=256, ge=1)
    """The length limit of a completion, in tokens; a longer completion is truncated there."""
    temperature: float = Field(default=1.0, gt=0)
    """The temperature of the rollouts, and of the student's and the teacher's distributions in the losses."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens whose probabilities sum to this share; 1 keeps the whole vocabulary."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many of the most likely tokens; 0 keeps the whole vocabulary."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Sample from the tokens that have at least this share of the most likely one's probability; 0 keeps the whole
    vocabulary."""
    stop_strings: list[str] = Field(default_factory=list)
    """Texts that end a completion: it ends with the first of them that it writes."""
    batch_size: int = Field(default=64, ge=1)
    """The number of sequences that are decoded at the same time."""
    judge_seconds: float = Field(default=120.0, gt=0)
    """How long to wait for a judgement, in seconds, before its rollout counts as ungraded. An async judge of whole
    batches has this long for each completion."""
    max_ungraded_share: float = Field(default=0.5, ge=0, le=1)
    """The run stops where the judge fails on a larger share of a batch's rollouts."""
    next_stage_at: float = Field(default=0.8, gt=0, le=1)
    """The share of successes in a rollout batch at which the next stage of a curriculum begins."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of the weights that sample; ``auto`` makes a bfloat16 copy where the device computes it natively."""


class Templates(Section):
    """The texts of the teacher's prompt around feedback and solution; ``{...}`` marks the slots."""

    prompt: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    """The whole last user message: the original one (``{prompt}``), the section with a solution or a critique
    (``{solution}``), and the section with feedback (``{feedback}``). A section without a text is empty."""
    solution: str = "\n\nCorrect solution:\n\n{text}"
    """The section with a sibling's solution."""
    critique: str = "\n\nThe following is a critique of your unsuccessful earlier attempt:\n\n{text}"
    """The section with a critique, which stands where a solution would."""
    feedback_on_failure: str = "\n\nThe following is feedback from your unsuccessful earlier attempt:\n\n{text}"
    """The section with the environment's feedback on a failed attempt."""
    feedback_on_success: str = "\n\nThe following is feedback from your successful earlier attempt:\n\n{text}"
    """The section with the environment's feedback on a successful attempt."""

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
    """How critiques are written: two or three sentences on each failed attempt."""

    endpoint: EndpointSettings | None = None
    """The endpoint of the model that writes the critiques; by default the trained network writes them itself."""
    max_tokens: int = Field(default=128, ge=1)
    """The length limit of a critique, in tokens, whoever writes it."""
    temperature: float = Field(default=0.7, ge=0)
    """The temperature at which the network writes critiques; an endpoint has a temperature of its own."""


class FeedbackSettings(Section):
    """What the teacher's prompt holds about a rollout."""

    sources: list[str] = Field(default=["sibling", "environment"], min_length=1)
    """The feedback sources in order of preference; each group takes the first that has a text for it. A source is
    ``environment``, ``sibling``, ``critique``, or a class of your own as ``package.module:Class`` (see
    :mod:`vpd.feedback.sources`)."""
    critique: CritiqueSettings = Field(default_factory=CritiqueSettings)
    """The settings of the source ``critique``."""
    sibling: Literal["first", "shortest"] = "first"
    """Which of a group's successes is shown: the first, or the shortest in tokens. A success that rambles on after its
    answer teaches the model not to end, and the next ones ramble longer; the shortest one keeps a run from drifting
    that way."""
    feedback_only_without_solution: bool = False
    """Leave the environment's text out where a sibling's solution is shown."""
    max_prompt_length: int = Field(default=10240, ge=1)
    """The length limit of the teacher's prompt, in tokens; only the solution and the feedback are shortened to meet
    it."""
    permute: bool = False
    """Give each rollout the feedback of another task. This is a control: training on it should do clearly worse."""
    templates: Templates = Field(default_factory=Templates)
    """The texts around solution and feedback in the teacher's prompt."""

    @model_validator(mode="after")
    def _names(self) -> FeedbackSettings:
        for name in self.sources:
            if name not in ("environment", "sibling", "critique") and ":" not in name:
                raise ValueError(
                    f"feedback.sources names {name!r}; there are environment, sibling, critique, and classes of your "
                    "own as package.module:Class"
                )
        return self
