"""Algorithms whose update is an M-step share what it needs: a teacher, its copies of weights, and its passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from vpd.algorithms.base import Algorithm, Passes
from vpd.algorithms.m_step import reads_old_log_probs
from vpd.algorithms.teacher import make_teacher
from vpd.config import MStepSettings

if TYPE_CHECKING:
    from vpd.config import VPDConfig

S = TypeVar("S", bound=MStepSettings)


class DistillationAlgorithm(Algorithm[S]):
    """An algorithm that distils a teacher, and learns nothing where there is no feedback."""

    reads_feedback = True
    follows_teacher = True
    needs_feedback = True

    def check(self, config: VPDConfig) -> None:
        """Refuse sampling that excludes tokens, which the sampled divergence cannot correct for."""
        super().check(config)
        check_sampling(self.settings, config)

    def weight_copies(self) -> Mapping[str, float]:
        """Return the copies of the weights that the teacher needs."""
        return make_teacher(self.settings).copies

    def matched_layers(self) -> Sequence[int]:
        """Return the layers whose hidden states are matched with the teacher's, where the settings name some."""
        return self.settings.representation_layers or ()

    def passes(self, prompts_per_step: int) -> Passes:
        """Count the M-step's passes."""
        return self.m_step_passes(prompts_per_step)

    def teacher_reads(self) -> int:
        """How many passes the teacher makes."""
        return make_teacher(self.settings).reads

    def m_step_passes(self, prompts_per_step: int, e_steps: float = 0.0, **e_step: Any) -> Passes:
        """Count the M-step's passes, and those of an E-step in a share of the steps.

        Tokens that are weighed by pi / pi_old need log pi_old before the update that comes in between: in every step
        with several minibatches, else in E-iterations alone.
        """
        if reads_old_log_probs(self.settings, prompts_per_step, e_step=False):
            reads = 1.0
        else:
            reads = e_steps * reads_old_log_probs(self.settings, prompts_per_step, e_step=True)
        return Passes(
            student_reads=reads,
            teacher_reads=self.teacher_reads(),
            teacher_reuses_keys=self.settings.teacher == "live",
            e_steps=e_steps,
            **e_step,
        )


def check_sampling(settings: MStepSettings, config: VPDConfig) -> None:
    """Refuse a sampled divergence on rollouts that top-p, top-k or min-p cut.

    Raises:
        ValueError: Says which settings contradict each other.
    """
    rollout = config.rollout
    is_cut = rollout.top_p < 1.0 or rollout.top_k > 0 or rollout.min_p > 0.0
    if is_cut and settings.divergence == "sampled":
        raise ValueError(
            'algorithm.divergence = "sampled" needs untruncated sampling, since a token that is never drawn has no '
            "part in its estimate: leave rollout.top_p, top_k and min_p at their defaults"
        )
