"""What the settings of algorithms have in common, and where an algorithm is found by its name.

Each algorithm's own settings stand beside it, in its file in :mod:`vpd.algorithms`.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from vpd.config.section import ConfigError, Section, did_you_mean


class AlgorithmSettings(Section):
    """The settings that every algorithm has; ``type`` names the algorithm."""

    type: str = ""
    """A name from the list of algorithms, one that was registered in Python, or ``package.module:Class``."""
    loss_aggregation: Literal["token_mean", "sequence_mean", "sum"] = "token_mean"
    """How the losses of tokens are put together: a mean over the completion tokens of the minibatch, a mean over each
    rollout's tokens and then over rollouts, or a sum."""
    m_minibatch_prompts: int | None = Field(default=None, ge=1)
    """How many prompts, with all their rollouts, one optimizer step (of the M-step) takes; the whole batch by
    default."""
    success: Literal["threshold", "group"] = "threshold"
    """What makes a rollout a success, which siblings are shown and the E-step learns from: a reward of
    ``success_threshold`` or more; or, for continuous rewards, a reward above the mean of its group (``group``). In a
    group with equal rewards all have failed. With ``group``, the gap and the best weights go by the mean reward, and
    accuracies still by the threshold."""
    success_threshold: float = 1.0
    """The reward from which a rollout is a success, and counts in the accuracy."""
    truncated: Literal["judge", "failure", "mask"] = "judge"
    """What becomes of a completion that the length limit ended. It is judged like any other, and its feedback says that
    it was cut (``judge``); or it has failed with a reward of 0, whatever it holds (``failure``); or it has failed, and
    is left out of the losses too (``mask``). Evaluations count it in the same way."""

    @property
    def threshold(self) -> float | None:
        """The reward from which a rollout succeeds; None where success goes by its group."""
        return self.success_threshold if self.success == "threshold" else None

    @property
    def title(self) -> str:
        """The algorithm's name for tables: ``VPD``, or the class of one of your own."""
        module, _, name = self.type.rpartition(":")
        return name if module else self.type.upper()

    @classmethod
    def schema_named(cls, name: str) -> type[BaseModel] | None:
        """The settings class of the algorithm of a name."""
        try:
            return algorithm_class(name).settings_class
        except ValueError:
            return None


class MStepSettings(AlgorithmSettings):
    """What is distilled, and how (VPD, arXiv 2605.15113, the M-step)."""

    has_e_steps: ClassVar[bool] = False
    """Whether E-steps may train an adapter of the teacher's own."""

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
    """The teacher, which is conditioned on the feedback: the network as it is at each minibatch (``live``) or as it was
    after the E-step (``frozen``), its running average (``ema``), the logits of the initial network and the live one
    mixed (``trust_region``), or, with ``vpd``, the network with an adapter that the student does not have (``lora``),
    which E-steps train in place of the shared weights."""
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
        if self.teacher == "lora" and not self.has_e_steps:
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


def bounded_importance(settings: dict[str, Any]) -> float | None:
    """The default of ``importance_clip`` where SDPO's code has 2; the sampled divergence has no bound."""
    return None if settings.get("divergence") == "sampled" else 2.0


class PolicyGradientSettings(AlgorithmSettings):
    """GRPO's objective, alone or mixed with a teacher."""

    epsilon: float = Field(default=0.2, ge=0)
    """The probability ratio stops counting below 1 - epsilon."""
    epsilon_high: float = Field(default=0.28, ge=0)
    """And above 1 + epsilon_high."""
    scale_rewards: bool = False
    """Divide a group's advantages by its rewards' standard deviation."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the penalty for leaving the initial model, as TRL's."""


_ALGORITHMS: dict[str, str | type[Any]] = {
    name: f"vpd.algorithms.{name}:{class_name}"
    for name, class_name in {
        "verified": "Verified",
        "vpd": "VPD",
        "sdpo": "SDPO",
        "grpo": "GRPO",
        "joint": "Joint",
        "reshape": "Reshape",
        "reweight": "Reweight",
        "opsa": "OPSA",
        "opd": "OPD",
    }.items()
}
"""Algorithms by name: classes, or where to import them from at first use."""


def algorithm_names() -> list[str]:
    """Return the names that ``algorithm.type`` knows."""
    return list(_ALGORITHMS)


def register_algorithm(name: str, algorithm: type[Any]) -> None:
    """Let ``algorithm.type`` name a class of your own, a :class:`vpd.algorithms.Algorithm`.

    Raises:
        ConfigError: The name is taken by another class.
    """
    known = _ALGORITHMS.get(name, algorithm)
    # A notebook's cell that runs again makes the same class anew.
    is_other = isinstance(known, str) or (known.__module__, known.__qualname__) != (
        algorithm.__module__,
        algorithm.__qualname__,
    )
    if is_other:
        raise ConfigError(f"There is an algorithm {name!r} already: choose another name.")
    _ALGORITHMS[name] = algorithm


def algorithm_class(name: str) -> type[Any]:
    """The :class:`vpd.algorithms.Algorithm` of a name, or of ``package.module:Class``.

    Raises:
        ValueError: There is no such algorithm, or it cannot be imported.
    """
    if not isinstance(name, str):
        raise ValueError(f"algorithm.type is {name!r}: give a name, one of {', '.join(_ALGORITHMS)}")
    found = _ALGORITHMS.get(name, name)
    if not isinstance(found, str):
        return found
    module, _, attribute = found.partition(":")
    if not attribute:
        raise ValueError(
            f"there is no algorithm {name!r}.{did_you_mean(name, _ALGORITHMS)} There are {', '.join(_ALGORITHMS)}, and "
            "classes of your own as package.module:Class"
        )
    try:
        algorithm = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # The module is the user's own, and may fail in any way.
        raise ValueError(f"the algorithm {name!r} cannot be imported: {error}") from error
    schema = getattr(algorithm, "settings_class", None)
    if not (isinstance(schema, type) and issubclass(schema, AlgorithmSettings)):
        raise ValueError(
            f"the algorithm {name!r} is no class with a settings_class: give a subclass of vpd.Algorithm, whose "
            "settings_class is a subclass of vpd.AlgorithmSettings"
        )
    return algorithm
