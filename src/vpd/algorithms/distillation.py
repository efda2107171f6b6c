"""What algorithms need whose update is an M-step: a teacher, its copies of weights, and its passes."""

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

    has_teacher = True
    needs_feedback = True

    def check(self, config: VPDConfig) -> None:
        """The sampled divergence needs every token to have a chance of being drawn."""
        super().check(config)
        check_sampling(self.settings, config)

    def weight_copies(self) -> Mapping[str, float]:
        """The copies that the teacher needs."""
        return make_teacher(self.settings).copies

    def matched_layers(self) -> Sequence[int]:
        """The layers whose hidden states are matched with the teacher's, where some are named."""
        return self.settings.representation_layers or ()

    def passes(self, prompts_per_step: int) -> Passes:
        """The M-step's passes."""
        return self.m_step_passes(prompts_per_step)

    def m_step_passes(self, prompts_per_step: int, e_steps: float = 0.0, **e_step: Any) -> Passes:
        """The M-step's passes, beside those of an E-step in a share of the steps.

        Tokens that are weighed by pi / pi_old are read before an update that comes between: in every step with several
        minibatches, else in E-iterations alone.
        """
        teacher = make_teacher(self.settings)
        if reads_old_log_probs(self.settings, prompts_per_step, e_step=False):
            reads = 1.0
        else:
            reads = e_steps * reads_old_log_probs(self.settings, prompts_per_step, e_step=True)
        return Passes(
            student_reads=reads,
            teacher_reads=teacher.reads,
            teacher_reuses_keys=self.settings.teacher == "live",
            e_steps=e_steps,
            **e_step,
        )


def check_sampling(settings: MStepSettings, config: VPDConfig) -> None:
    """Refuse a sampled divergence on rollouts whose distribution was cut.

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
