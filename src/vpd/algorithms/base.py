"""What an algorithm is: its settings, what it needs of the trainer, and its update on one batch of rollouts.

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
from collections.abc import Callable, Mapping, Sequence
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
    """The rollouts of one batch as losses see them.

    Attributes:
        examples: The rollouts of this process, with and without feedback.
        step: The number of the rollout batch, counted from 1.
        prompts: The number of the batch's prompts, over all processes.
        sample_fresh: Makes held-out rollouts on which an E-step is measured; None leaves the measurement out.
    """

    examples: Sequence[Example]
    step: int
    prompts: int
    sample_fresh: Callable[[], list[Example]] | None = None


@dataclass
class TokenNumbers:
    """What the M-step saw of each completion token of one rollout before its update: [T] each.

    Where a rollout has several turns, those that have a teacher stand one after another.
    """

    student_log_probs: list[float]
    teacher_log_probs: list[float]
    divergence: list[float]


@dataclass
class UpdateResult:
    """What an algorithm did with one batch.

    Attributes:
        metrics: Numbers for ``metrics.jsonl``, the same on all processes.
        tokens: The numbers of every token, by the index of the rollout.
        seconds: The seconds of each phase, ``e_step`` and ``m_step``.
    """

    metrics: dict[str, float | None]
    tokens: dict[int, TokenNumbers] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Passes:
    """Which passes a step makes besides the student's training pass; :mod:`vpd.planning` predicts its cost from them.

    Attributes:
        student_reads: Passes without gradient over the student's sequences in an average step.
        teacher_reads: Passes without gradient over the teacher's sequences.
        teacher_reads_feedback: Whether these sequences hold feedback; else they are the student's.
        teacher_model: The name of the network that makes them; None for the policy's own.
        teacher_bytes: The bytes of one weight of that network.
        teacher_reuses_keys: Whether the teacher's pass may take keys and values from the student's.
        e_steps: The share of steps that begin with an E-step.
        e_epochs: Passes with gradient over the teacher's sequences in an E-step.
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
        settings_class: The section of settings that ``algorithm.type`` chooses with the algorithm.
        has_teacher: Whether feedback is read: only then are teacher's prompts built and the gap measured.
        needs_feedback: Whether a batch without any feedback teaches nothing.
        needs_verdicts: Whether a rollout must have been judged to take part.
        memory: Numbers that are kept from one batch to the next; they are saved with the run.
    """

    settings_class: ClassVar[type[Any]]
    has_teacher: bool = False
    needs_feedback: bool = False
    needs_verdicts: bool = True

    def __init__(self, settings: S) -> None:
        self.settings = settings
        self.memory: dict[str, float] = {}

    def prepare(self, learner: Learner, tokenizer: PreTrainedTokenizerBase, model: ModelSettings) -> None:
        """Get ready, once before training: load another network, for example.

        Args:
            learner: The policy.
            tokenizer: The policy's.
            model: The settings of the policy's network.
        """

    @abstractmethod
    def update(self, learner: Learner, batch: ExampleBatch) -> UpdateResult:
        """Run one iteration's updates on a batch of rollouts."""

    def check(self, config: VPDConfig) -> None:
        """Refuse settings of the run that the algorithm cannot work with.

        Raises:
            ValueError: The message says what contradicts what, and how to mend it.
        """
        for name in ("m_minibatch_prompts", "e_minibatch_prompts"):
            size, prompts = getattr(self.settings, name, None), config.rollout.prompts_per_step
            if size is not None and size > prompts:
                raise ValueError(
                    f"algorithm.{name} = {size} is more than the batch holds (rollout.prompts_per_step = {prompts}): "
                    "lower it or leave it out"
                )

    def weight_copies(self) -> Mapping[str, float]:
        """The copies of the trained weights that are needed, by name, and how far each batch pulls them along.

        The names are those of :mod:`vpd.policy.copies`; a rate of 0 keeps the copy as it is.
        """
        return {}

    def matched_layers(self) -> Sequence[int]:
        """The layers, counted from 1, whose hidden states the loss names; the model must have them."""
        return ()

    def teacher_adapter(self) -> LoraSettings | None:
        """The adapter of the teacher's own that E-steps train; None where student and teacher share all weights."""
        return None

    def warnings(self) -> dict[str, str]:
        """What works against itself in the settings, though it is no mistake: texts by name."""
        return {}

    def passes(self, prompts_per_step: int) -> Passes:
        """Which passes a step of so many prompts makes."""
        return Passes()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint saves of the algorithm."""
        return {"memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint has saved."""
        self.memory = dict(state["memory"])
