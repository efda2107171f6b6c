"""In on-policy distillation (OPD) another, stronger model teaches, token by token, on the student's own rollouts.

    L = E_{y ~ pi} sum_t D( pi(.|x,y_<t), q'(.|x,y_<t) )

The teacher q' is a frozen network of its own width and head (Agarwal et al., arXiv 2306.13649). It reads the task as
the student does, so that neither rewards nor feedback are needed, or it is conditioned on the feedback like the teacher
of VPD. Both networks must have the same tokenizer, which is checked id by id. Their vocabularies may be padded to other
sizes: then the divergence is over the tokens that both have, and a rollout with another token is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from vpd.algorithms.base import ExampleBatch, Passes, UpdateResult
from vpd.algorithms.distillation import DistillationAlgorithm
from vpd.algorithms.example import Example, with_teacher
from vpd.algorithms.m_step import distil, old_log_probs
from vpd.algorithms.teacher import Teacher
from vpd.config import ConfigError, ModelSettings, MStepSettings, Section
from vpd.losses import Head
from vpd.policy.architecture import head_of
from vpd.policy.learner import Learner
from vpd.policy.load import load_policy
from vpd.policy.module import PolicyModule
from vpd.policy.objectives import ScoredStates
from vpd.policy.prepare import make_module
from vpd.timing import Timer


class TeacherModelSettings(Section):
    """The settings of the network that teaches."""

    name: str
    """The network that teaches: a hub id, a folder, a GGUF file or a short name, as in ``model.name``."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The precision of its weights."""
    prompt: Literal["task", "feedback"] = "task"
    """The teacher is conditioned on the task alone, like the student, or on the task with the feedback on the attempt.
    With ``task`` neither a judge nor feedback is needed."""


class OPDSettings(MStepSettings):
    """The settings of on-policy distillation from another model."""

    type: Literal["opd"] = "opd"  # pyright: ignore[reportIncompatibleVariableOverride]
    teacher_model: TeacherModelSettings
    """The network that teaches."""
    teacher: Literal["model"] = "model"  # pyright: ignore[reportIncompatibleVariableOverride]
    """The teacher is always the network of ``teacher_model``."""
    importance_clip: float | None = Field(default=None, ge=0)
    """The largest weight pi / pi_old of a token's divergence, with the meaning that it has in ``vpd``."""

    @model_validator(mode="after")
    def _divergence_alone(self) -> OPDSettings:
        if self.representation_weight:
            raise ValueError(
                "algorithm.representation_weight compares hidden states of one network, and opd has two: leave it out"
            )
        return self


class ModelTeacher(Teacher):
    """Predicts with another network than the policy's.

    Args:
        settings: The algorithm's settings.
        network: The teacher's network, frozen and on the device.
        head: The teacher's head, over the tokens that both networks have.
    """

    def __init__(self, settings: OPDSettings, network: PolicyModule, head: Head) -> None:
        super().__init__(settings)
        self._network = network
        self._head = head

    def read(self, learner: Learner, examples: Sequence[Example]) -> ScoredStates:
        return replace(self._states(learner, examples, self._network), head=self._head)


class OPD(DistillationAlgorithm[OPDSettings]):
    """Runs the M-step with another network as the teacher."""

    settings_class = OPDSettings

    def __init__(self, settings: OPDSettings) -> None:
        super().__init__(settings)
        reads_feedback = settings.teacher_model.prompt == "feedback"
        self.reads_feedback = self.follows_teacher = self.needs_feedback = self.needs_verdicts = reads_feedback
        self._teacher: ModelTeacher | None = None
        self._tokens = 0

    def prepare(self, learner: Learner, tokenizer: PreTrainedTokenizerBase, model: ModelSettings) -> None:
        """Load the teacher and compare the two tokenizers.

        Raises:
            ConfigError: The teacher cannot be loaded, or its tokens are not the student's.
        """
        settings = self.settings.teacher_model
        loaded = load_policy(settings.name, dtype=getattr(torch, settings.dtype), chats=False)
        check_same_tokens(tokenizer, loaded.tokenizer, settings.name)
        network = make_module(loaded.model, model).requires_grad_(False).eval()
        network.to(learner.accelerator.device)
        student, teacher = (head_of(module.model) for module in (learner.module, network))
        self._tokens = min(student.vocabulary_size, teacher.vocabulary_size)
        self._teacher = ModelTeacher(self.settings, network, teacher.first(self._tokens))

    def update(self, learner: Learner, batch: ExampleBatch) -> UpdateResult:
        assert self._teacher is not None, "prepare() comes first."
        conditioned, timer = self._conditioned(batch.examples), Timer()
        examples = [example for example in conditioned if max(example.completion) < self._tokens]
        with timer("m_step"):
            old = old_log_probs(learner, examples, self.settings, batch.prompts)
            # The margin's temperature is a setting of the E-step, and nothing here depends on it.
            betas = torch.ones(len(examples))
            result = distil(learner, examples, self.settings, batch.prompts, betas, old, self._teacher)
        (left_out,) = learner.total(len(conditioned) - len(examples))
        result.metrics["rollouts_of_other_tokens"] = left_out
        result.seconds = dict(timer.seconds)
        return result

    def weight_copies(self) -> Mapping[str, float]:
        """Ask for no copies, since the teacher has other weights."""
        return {}

    def teacher_reads(self) -> int:
        """One pass of the other network."""
        return 1

    def passes(self, prompts_per_step: int) -> Passes:
        """Count the M-step's passes, whose teacher is another network."""
        return replace(
            self.m_step_passes(prompts_per_step),
            teacher_model=self.settings.teacher_model.name,
            teacher_bytes=2 if self.settings.teacher_model.dtype == "bfloat16" else 4,
            teacher_reads_feedback=self.reads_feedback,
        )

    def _conditioned(self, examples: Sequence[Example]) -> list[Example]:
        """Give each rollout the prompt that the teacher reads, which may be the student's."""
        if self.reads_feedback:
            return with_teacher(examples)
        return [
            replace(example, turns=tuple(replace(turn, teacher_prompt=turn.student_prompt) for turn in example.turns))
            for example in examples
        ]


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a teacher whose token ids mean something else than the student's.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's tokenizer.
        name: The teacher's name, for the message.

    Raises:
        ConfigError: Names the first id that differs.
    """
    counts = len(student), len(teacher)
    own, other = (tokenizer.convert_ids_to_tokens(list(range(max(counts)))) for tokenizer in (student, teacher))
    for index, (left, right) in enumerate(zip(own, other, strict=True)):
        if left != right:
            raise ConfigError(
                f"The teacher {name} has another tokenizer than the student: id {index} is {right!r} there and "
                f"{left!r} here. On-policy distillation compares token by token: choose a teacher of the same family."
            )
