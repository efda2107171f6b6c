"""An algorithm has settings, says what it needs of the trainer, and updates the policy on one batch of rollouts.

An algorithm of your own is one file with two classes, its settings and itself. ``algorithm.type`` finds it as
``package.module:Class``, or by a name that :func:`vpd.register_algorithm` gave it::

    class BestOnlySettings(AlgorithmSettings):
        type: str = "my_package.best_only:BestOnly"

    class BestOnly(Algorithm[BestOnlySettings]):
        settings_class = BestOnlySettings

        def update(self, learner, batch):
            ...
            return UpdateResult({"m_loss": step.loss})
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from vpd.algorithms.example import Example
from vpd.config import AlgorithmSettings, LoraSettings, ModelSettings
from vpd.policy.learner import Learner

if TYPE_CHECKING:
    from vpd.config import VPDConfig

S = TypeVar("S", bound=AlgorithmSettings)


@dataclass(frozen=True)
class ExampleBatch:
    """The rollouts of one batch, as the losses see them.

    Attributes:
        examples: The rollouts of this process, with and without feedback.
        step: The number of the rollout batch, counted from 1.
        prompts: How many prompts the batch has, over all processes.
        fresh: Held-out rollouts on which an E-step is measured; None leaves the measurement out.
        second_attempts: The judged completions that the teacher wrote where :meth:`Algorithm.second_attempts` asked for
            them. Each has the group and the student's prompt of the rollout whose feedback the teacher had read.
    """

    examples: Sequence[Example]
    step: int
    prompts: int
    fresh: Sequence[Example] | None = None
    second_attempts: Sequence[Example] = ()


@dataclass
class TokenNumbers:
    """The M-step's numbers for each completion token of one rollout before its update.

    Where a rollout has several turns, the tokens of those that have a teacher stand one turn after another.

    Attributes:
        student_log_probs: The student's log-probability of each token [T].
        teacher_log_probs: The teacher's log-probability of each token [T].
        divergence: The divergence of the two distributions at each token [T].
    """

    student_log_probs: list[float]
    teacher_log_probs: list[float]
    divergence: list[float]


@dataclass
class UpdateResult:
    """The result of an algorithm's update on one batch.

    Attributes:
        metrics: The numbers for ``metrics.jsonl``, the same on all processes.
        tokens: The numbers of every token, by the index of the rollout.
        seconds: The seconds of each phase, ``e_step`` and ``m_step``.
    """

    metrics: dict[str, float | None]
    tokens: dict[int, TokenNumbers] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Passes:
    """Counts a step's passes besides the student's training pass, so that :mod:`vpd.planning` can predict its cost.

    Attributes:
        student_reads: How many passes without gradient an average step makes over the student's sequences.
        teacher_reads: How many passes without gradient it makes over the teacher's sequences.
        teacher_reads_feedback: Whether these sequences hold feedback; otherwise they are the student's.
        teacher_model: The name of the network that makes them; None for the policy's own.
        teacher_bytes: How many bytes one weight of that network takes.
        teacher_reuses_keys: Whether the teacher's pass may take keys and values from the student's.
        e_steps: The share of steps that begin with an E-step.
        e_epochs: How many passes with gradient an E-step makes over the teacher's sequences.
        e_is_whole: Whether an E-step takes the whole batch in one optimizer step.
        prior_reuses_keys: Whether the E-step's prior may take keys and values from the teacher's pass.
    """

    student_reads: float = 0.0
    teacher_reads: int = 0
    teacher_reads_feedback: bool = True
    teacher_model: str | None = None
    teacher_bytes: int = 0
    teacher_reuses_keys: bool = False
    e_steps: float = 0.0
    e_epochs: int = 1
    e_is_whole: bool = True
    prior_reuses_keys: bool = False


class Algorithm(ABC, Generic[S]):
    """Says which loss is taken on which rollouts, and what the trainer must provide for it.

    The defaults are those of an algorithm that learns from rewards alone.

    Attributes:
        settings_class: The class of settings that ``algorithm.type`` chooses together with the algorithm.
        reads_feedback: Whether a teacher is conditioned on the feedback, so that what it read is kept with the samples.
        follows_teacher: Whether the student follows the teacher without a judge in between. Then the gap between the
            two is measured before training, since a teacher that is behind does harm.
        needs_feedback: Whether a batch without any feedback teaches nothing.
        needs_verdicts: Whether a rollout must have been judged to take part.
        memory: The numbers that outlast a batch; they are saved with the run.
    """

    settings_class: ClassVar[type[Any]]
    reads_feedback: bool = False
    follows_teacher: bool = False
    needs_feedback: bool = False
    needs_verdicts: bool = True

    def __init__(self, settings: S) -> None:
        self.settings = settings
        self.memory: dict[str, float] = {}

    def prepare(self, learner: Learner, tokenizer: PreTrainedTokenizerBase, model: ModelSettings) -> None:
        """Get ready once before training, for example by loading another network.

        Args:
            learner: The policy.
            tokenizer: The policy's tokenizer.
            model: The settings of the policy's network.
        """

    def wants_fresh(self, learner: Learner, batch: ExampleBatch) -> bool:
        """Whether the update on this batch measures itself on held-out rollouts; the same on all processes."""
        return False

    def second_attempts(self, learner: Learner, examples: Sequence[Example]) -> Sequence[int]:
        """Choose rollouts of this process whose feedback the teacher reads to answer the task once more.

        Each answer is judged as the student's are, and is among the batch's ``second_attempts``; by default none is
        asked for.

        Args:
            learner: The policy.
            examples: The rollouts of this process.

        Returns:
            The indices of the chosen rollouts, each of which has a teacher and one turn.
        """
        return ()

    @abstractmethod
    def update(self, learner: Learner, batch: ExampleBatch) -> UpdateResult:
        """Run one iteration's updates on a batch of rollouts."""

    def check(self, config: VPDConfig) -> None:
        """Refuse settings of the run that the algorithm cannot work with.

        Raises:
            ValueError: The message says what contradicts what, and how to mend it.
        """
        check_minibatch("m_minibatch_prompts", self.settings.m_minibatch_prompts, config)

    def weight_copies(self) -> Mapping[str, float]:
        """Ask for copies of the trained weights: their names, each with how far every batch pulls it along.

        The names are those of :mod:`vpd.policy.copies`. A rate of 0 keeps the copy as it is.
        """
        return {}

    def matched_layers(self) -> Sequence[int]:
        """Return the layers, counted from 1, whose hidden states the loss matches; the model must have them."""
        return ()

    def teacher_adapter(self) -> LoraSettings | None:
        """Return the settings of the adapter that E-steps train; None where student and teacher share all weights."""
        return None

    def warnings(self) -> dict[str, str]:
        """Return texts, by name, about settings that work against each other without being a mistake."""
        return {}

    def passes(self, prompts_per_step: int) -> Passes:
        """Count the passes of a step with so many prompts."""
        return Passes()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint saves of the algorithm."""
        return {"memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint has saved."""
        self.memory = dict(state["memory"])


def check_minibatch(name: str, size: int | None, config: VPDConfig) -> None:
    """Refuse minibatches that are larger than the batch.

    Args:
        name: The setting's name in the section of the algorithm.
        size: The prompts of a minibatch; None for the whole batch.
        config: The run's settings.

    Raises:
        ValueError: The minibatch is too large.
    """
    prompts = config.rollout.prompts_per_step
    if size is not None and size > prompts:
        raise ValueError(
            f"algorithm.{name} = {size} is more than the batch holds (rollout.prompts_per_step = {prompts}): lower it "
            "or leave it out"
        )
