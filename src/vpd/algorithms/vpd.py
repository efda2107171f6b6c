"""Variational Policy Distillation (arXiv 2605.15113): an E-step refines the teacher, an M-step distils it.

The E-step learns from outcomes, every F rollout batches; the M-step works on the same rollouts.

The teacher is the network itself, conditioned on the feedback, so that it stays ahead of the student that distils it
only if outcomes refine it. E-iterations are the batches 1, 1+F, 1+2F, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from vpd.algorithms.base import ExampleBatch, Passes, UpdateResult, check_minibatch
from vpd.algorithms.distillation import DistillationAlgorithm
from vpd.algorithms.e_step import betas, holds_both_classes, refine_teacher
from vpd.algorithms.example import with_teacher
from vpd.algorithms.m_step import distil, old_log_probs
from vpd.config import LoraSettings, MStepSettings
from vpd.policy.copies import INITIAL
from vpd.policy.learner import Learner
from vpd.timing import Timer

if TYPE_CHECKING:
    from vpd.config import VPDConfig


class VPDSettings(MStepSettings):
    """Variational Policy Distillation: the teacher is refined on outcomes every F batches, then distilled."""

    has_e_steps: ClassVar[bool] = True

    type: Literal["vpd"] = "vpd"  # pyright: ignore[reportIncompatibleVariableOverride]
    teacher_lora: LoraSettings = Field(default_factory=LoraSettings)
    """The adapter of the teacher's own, with ``teacher = "lora"``."""
    e_step_every: int = Field(default=5, ge=1)
    """F: one E-step every F rollout batches, the first batch included."""
    bco_beta: float = Field(default=0.1, gt=0)
    """The temperature of the implicit reward."""
    e_minibatch_prompts: int | None = Field(default=None, ge=1)
    """How many prompts, with all their rollouts, one optimizer step of the E-step takes; the whole batch by default."""
    e_epochs: int = Field(default=1, ge=1)
    """How many times one E-step goes over the batch."""
    prior: Literal["dynamic", "fixed"] = "dynamic"
    """What the teacher is held to: the student at the start of each E-step, or the initial model."""
    length_reference: float | None = Field(default=None, gt=0)
    """Multiply ``bco_beta`` by this many tokens over a completion's length, so that long ones weigh no more; None
    leaves the sums over tokens as in the paper."""
    shift_momentum: float = Field(default=0.0, ge=0, lt=1)
    """The share of the last E-step's delta in this one's; 0 as in the paper's algorithm."""
    e_learning_rate_factor: float = Field(default=1.0, ge=0)
    """The E-step's learning rate is the run's times this; it also holds for what momentum carries into M-steps."""


def is_e_iteration(step: int, e_step_every: int) -> bool:
    """Whether rollout batch ``step``, counted from 1, begins with an E-step."""
    return (step - 1) % e_step_every == 0


class VPD(DistillationAlgorithm[VPDSettings]):
    """E-step where it is due and possible, then the M-step (Algorithm 1).

    The metric ``e_step`` is 1 for an E-step, 0 for one that was due but had one class only, and None where none was
    due. ``margin_on_arrival`` is the teacher's margin against the student on rollouts that no update has seen yet.
    """

    settings_class = VPDSettings

    def update(self, learner: Learner, batch: ExampleBatch) -> UpdateResult:
        settings, examples, timer = self.settings, with_teacher(batch.examples), Timer()
        is_due = is_e_iteration(batch.step, settings.e_step_every)
        with timer("m_step"):
            old = old_log_probs(learner, examples, settings, batch.prompts, e_step=is_due)
        metrics: dict[str, float | None] = {"e_step": 0.0 if is_due else None}
        refinement = None
        if is_due and holds_both_classes(learner, examples):
            with timer("e_step"):
                measures_after = not self._m_step_reads_refined_teacher(batch.prompts)
                refinement = refine_teacher(
                    learner, examples, settings, batch.prompts, batch.fresh, self.memory, measures_after
                )
            metrics = refinement.metrics
        with timer("m_step"):
            result = distil(learner, examples, settings, batch.prompts, betas(examples, settings), old)
        if refinement is not None and "margin_after" not in metrics:
            refined = [sum(result.tokens[example.rollout].teacher_log_probs) for example in examples]
            metrics |= refinement.margins_after(torch.tensor(refined))
        # After an E-step the M-step's margin is that of a teacher refined on these same rollouts.
        arrival = result.metrics.get("margin") if refinement is None else metrics.get("margin_before")
        if refinement is not None and settings.prior == "fixed":
            arrival = None
        merged = metrics | result.metrics | {"margin_on_arrival": arrival}
        return UpdateResult(merged, result.tokens, dict(timer.seconds))

    def wants_fresh(self, learner: Learner, batch: ExampleBatch) -> bool:
        """Held-out rollouts are for an E-step that is due and possible."""
        is_due = is_e_iteration(batch.step, self.settings.e_step_every)
        return is_due and holds_both_classes(learner, with_teacher(batch.examples))

    def check(self, config: VPDConfig) -> None:
        super().check(config)
        check_minibatch("e_minibatch_prompts", self.settings.e_minibatch_prompts, config)

    def _m_step_reads_refined_teacher(self, batch_prompts: int) -> bool:
        """Whether the M-step's teacher is, for every rollout, the network as the E-step has left it."""
        minibatch, teacher = self.settings.m_minibatch_prompts, self.settings.teacher
        is_whole = minibatch is None or minibatch >= batch_prompts
        return teacher == "frozen" or (teacher in ("live", "lora") and is_whole)

    def weight_copies(self) -> Mapping[str, float]:
        """A fixed prior is the initial model."""
        fixed = {INITIAL: 0.0} if self.settings.prior == "fixed" else {}
        return {**fixed, **super().weight_copies()}

    def teacher_adapter(self) -> LoraSettings | None:
        """The adapter that ``teacher = "lora"`` asks for."""
        return self.settings.teacher_lora if self.settings.teacher == "lora" else None

    def warnings(self) -> dict[str, str]:
        """A running average nearly cancels the E-step in what the M-step distils."""
        if self.settings.teacher != "ema":
            return {}
        return {
            "averaged_teacher": (
                "With a running average as the teacher, an E-step moves what the M-step distils by "
                f'{self.settings.ema_rate:.0%} only, from the next batch on: algorithm.teacher = "live" keeps it.'
            )
        }

    def passes(self, prompts_per_step: int) -> Passes:
        """The M-step's passes, and an E-step's every F batches."""
        settings = self.settings
        return self.m_step_passes(
            prompts_per_step,
            e_steps=1 / settings.e_step_every,
            e_epochs=settings.e_epochs,
            e_is_whole=settings.e_minibatch_prompts in (None, prompts_per_step),
            prior_reuses_keys=settings.prior == "dynamic" and settings.teacher != "lora",
        )
