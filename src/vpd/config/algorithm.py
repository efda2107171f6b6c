"""Settings of the algorithms: one section each, told apart by ``type``, with its own vetted defaults."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from vpd.config.lora import LoraSettings
from vpd.config.section import Section


class UpdateSettings(Section):
    has_teacher: ClassVar[bool] = True
    """Whether the algorithm reads feedback."""

    loss_aggregation: Literal["token_mean", "sequence_mean", "sum"] = "token_mean"
    m_minibatch_prompts: int | None = Field(default=None, ge=1)
    """Prompts, with all their rollouts, per optimizer step (of the M-step); the whole batch by default."""
    success_threshold: float = 1.0
    """A rollout whose reward reaches it is a success."""
    truncated: Literal["failure", "mask"] = "failure"
    """What a rollout is that the length limit ended: a failure that is told so, or left out of the losses."""


class MStepSettings(UpdateSettings):
    divergence: Literal["reverse_kl", "forward_kl", "js", "sampled"] = "reverse_kl"
    """Between student and teacher at each completion token; ``sampled`` estimates the reverse KL's gradient from the
    tokens that were written, without a sum over the vocabulary."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Mixing weight of ``js``; 0 is the forward KL, 1 the reverse."""
    top_k: int | None = Field(default=None, ge=1)
    """K, tokens of the vocabulary that are told apart; all of them by default."""
    support: Literal["student", "intersection"] = "student"
    """With ``top_k``, which: the student's most likely ones, or their intersection with the teacher's."""
    correction: Literal["tail", "renormalise", "stopgrad"] = "tail"
    """With ``top_k``, what becomes of the other tokens: one bucket; nothing, both sides scaled to 1; or the approximate
    surrogate of the reverse KL."""
    control_variate: bool = True
    """With ``sampled``: the exact divergence of each token as a baseline, which lowers the variance."""
    teacher: Literal["live", "frozen", "ema", "trust_region", "lora"] = "live"
    """Whose predictions behind the feedback are distilled: the network's at each minibatch; as they were after the
    E-step; a running average's; logits mixed from the initial network and the live one; or, with ``vpd``, those of
    the network with an adapter of the teacher's own (``lora``), which E-steps train in place of the shared weights."""
    ema_rate: float = Field(default=0.05, gt=0, le=1)
    """With ``ema``: how far each rollout batch pulls the average towards the network, after all of its updates."""
    trust_region_share: float = Field(default=0.05, ge=0, le=1)
    """With ``trust_region``: the live network's share of the logits."""
    teacher_share: float = Field(default=1.0, gt=0, le=1)
    """The target is this share of the teacher and the rest of the student itself, both as probabilities (top-D)."""
    representation_weight: float = Field(default=0.0, ge=0)
    """Of the squared distance between the student's hidden states and the teacher's, added to the divergence (OPRD)."""
    representation_layers: list[int] | None = Field(default=None, min_length=1)
    """Which layers' outputs, counted from 1; all by default."""
    importance_clip: float | None = Field(default=None, ge=0)
    """Each token's divergence counts as often as the student would now write the token, pi / pi_old, but at most this;
    0 lets all count the same. By default they count the same, and with ``sampled`` by the unbounded ratio, which leaves
    the estimate unbiased."""

    @property
    def weighs_tokens(self) -> bool:
        """Whether a token's weight depends on what the student has become since it wrote it."""
        return self.importance_clip != 0 and (self.divergence == "sampled" or self.importance_clip is not None)

    @model_validator(mode="after")
    def _objective(self) -> MStepSettings:
        if self.teacher == "lora" and not isinstance(self, VPD):
            raise ValueError('algorithm.teacher = "lora" is trained by E-steps, which algorithm.type = "vpd" alone has')
        if self.top_k is not None and self.divergence == "sampled":
            raise ValueError('algorithm.top_k does nothing with divergence = "sampled": leave one of them out')
        if self.top_k is not None and self.correction == "stopgrad" and self.divergence != "reverse_kl":
            raise ValueError(
                f'algorithm.correction = "stopgrad" is for reverse_kl, not {self.divergence}: '
                'take "tail" or "renormalise"'
            )
        if self.representation_weight and self.teacher == "trust_region":
            raise ValueError(
                'algorithm.representation_weight needs one network as the teacher, and "trust_region" mixes two: take '
                'algorithm.teacher = "live"'
            )
        if self.representation_layers is not None and not self.representation_weight:
            raise ValueError(
                "algorithm.representation_layers does nothing without algorithm.representation_weight: set it, or "
                "leave the layers out"
            )
        if self.importance_clip is not None and 0 < self.importance_clip < 1:
            raise ValueError(
                f"algorithm.importance_clip is {self.importance_clip}, so that no token would ever count in full: "
                "take 1 or more, or 0 for no weights"
            )
        return self


class VPD(MStepSettings):
    """Variational Policy Distillation: the teacher is refined on outcomes every F batches, then distilled."""

    type: Literal["vpd"] = "vpd"
    teacher_lora: LoraSettings = Field(default_factory=LoraSettings)
    """With ``lora``: its adapter."""
    e_step_every: int = Field(default=5, ge=1)
    """F: one E-step every F rollout batches, the first batch included."""
    bco_beta: float = Field(default=0.1, gt=0)
    """Temperature of the implicit reward."""
    e_minibatch_prompts: int | None = Field(default=None, ge=1)
    """Prompts, with all their rollouts, per optimizer step of the E-step; the whole batch by default."""
    e_epochs: int = Field(default=1, ge=1)
    """Passes over the batch in one E-step."""
    prior: Literal["dynamic", "fixed"] = "dynamic"
    """What the teacher is held to: the student at the start of each E-step, or the initial model."""
    length_reference: float | None = Field(default=None, gt=0)
    """Multiply ``bco_beta`` by this many tokens over a completion's length, so that long ones weigh no more; None
    leaves the sums over tokens as in the paper."""
    shift_momentum: float = Field(default=0.0, ge=0, lt=1)
    """Share of the last E-step's shift in this one's; 0 as in the paper's algorithm."""
    e_learning_rate_factor: float = Field(default=1.0, ge=0)
    """The E-step's learning rate is the run's times this; it also holds for what momentum carries into M-steps."""


def _sdpo_clip(settings: dict[str, Any]) -> float | None:
    return None if settings.get("divergence") == "sampled" else 2.0


class SDPO(MStepSettings):
    """Self-distillation policy optimisation: the same loop without E-steps."""

    type: Literal["sdpo"] = "sdpo"
    teacher: Literal["live", "frozen", "ema", "trust_region", "lora"] = "ema"
    """A running average, as in the paper's baseline; ``live`` is VPD without its E-steps (with ``importance_clip`` 0,
    where a batch has several M-minibatches)."""
    importance_clip: float | None = Field(default_factory=_sdpo_clip, ge=0)
    """2 as in SDPO's code, where tokens weigh something else than 1: with several M-minibatches. With ``sampled`` no
    bound."""


class PolicyGradientSettings(UpdateSettings):
    """GRPO's objective, alone or mixed with a teacher."""

    epsilon: float = Field(default=0.2, ge=0)
    """The probability ratio stops counting below 1 - epsilon."""
    epsilon_high: float = Field(default=0.28, ge=0)
    """And above 1 + epsilon_high."""
    scale_rewards: bool = False
    """Divide a group's advantages by its rewards' standard deviation."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the penalty for leaving the initial model, as TRL's."""


class GRPO(PolicyGradientSettings):
    """Group relative policy optimisation: rewards alone, no teacher."""

    has_teacher: ClassVar[bool] = False
    type: Literal["grpo"] = "grpo"


class Joint(PolicyGradientSettings, MStepSettings):
    """The sum of the distillation loss and GRPO's."""

    type: Literal["joint"] = "joint"
    distillation_weight: float = Field(default=1.0, ge=0)
    reward_weight: float = Field(default=1.0, ge=0)
    importance_clip: float | None = Field(default_factory=_sdpo_clip, ge=0)
    """Of the distillation's tokens, as in SDPO."""

    @model_validator(mode="after")
    def _teacher(self) -> Joint:
        if self.teacher == "frozen":
            raise ValueError('algorithm.teacher = "frozen" is not offered with joint: take "live" or "ema"')
        return self


class Reshape(PolicyGradientSettings):
    """GRPO with log q - log pi of each token added to its advantage."""

    type: Literal["reshape"] = "reshape"
    distillation_weight: float = Field(default=1.0, ge=0)
    reward_weight: float = Field(default=1.0, ge=0)


class Reweight(PolicyGradientSettings):
    """GRPO whose advantages weigh more at tokens where the teacher agrees with their sign."""

    type: Literal["reweight"] = "reweight"
    weight_epsilon: float = Field(default=0.2, ge=0, lt=1)
    """A token's weight stays between 1 - weight_epsilon and 1 + weight_epsilon."""
    mixing: float = Field(default=1.0, ge=0, le=1)
    """Share of the weighted advantage in the first batch; it falls linearly."""
    mixing_steps: int = Field(default=100, ge=1)
    """Rollout batches until it is zero."""


class OPSA(PolicyGradientSettings):
    """A control without teacher and reward: it lowers the least likely of the tokens that were written."""

    has_teacher: ClassVar[bool] = False
    type: Literal["opsa"] = "opsa"
    token_share: float = Field(default=0.2, gt=0, le=1)
    """Share of a batch's completion tokens that are lowered, those of the smallest probability."""


AlgorithmSettings: TypeAlias = Annotated[
    VPD | SDPO | GRPO | Joint | Reshape | Reweight | OPSA, Field(discriminator="type")
]
