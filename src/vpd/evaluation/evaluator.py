"""Makes the measurements of a run with its settings."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from vpd.config import VPDConfig
from vpd.environments import Environment, Split
from vpd.evaluation.accuracy import Evaluation, evaluate
from vpd.evaluation.gap import Gap, measure_gap
from vpd.feedback import FeedbackSource
from vpd.rollout import RolloutSampler
from vpd.seeds import mix


class Evaluator:
    """Measures the policy that a sampler samples from.

    Args:
        sampler: Samples completions and has them judged.
        environment: Holds the tasks of each split.
        args: The settings of the run.
        accelerator: Tells which process this is.
        sources: The sources of feedback; by default those of the settings that need nothing else.
    """

    def __init__(
        self,
        sampler: RolloutSampler,
        environment: Environment,
        args: VPDConfig,
        accelerator: Accelerator,
        sources: Sequence[FeedbackSource] | None = None,
    ) -> None:
        self._sources = sources
        self._sampler = sampler
        self._environment = environment
        self._args = args
        self._accelerator = accelerator

    @property
    def has_judge(self) -> bool:
        """Whether there is anything to measure: whether completions are judged."""
        return self._environment.judges

    @property
    def threshold(self) -> float | None:
        """The reward from which a completion succeeds; None where that goes by its group."""
        return self._args.algorithm.threshold

    def accuracy(self, split: Split, limit: int | None = None) -> Evaluation:
        """Measure the accuracy on the first ``limit`` tasks of a split; the processes share the work."""
        return evaluate(
            self._sampler,
            list(self._environment.tasks(split))[:limit],
            self._args.eval,
            self._args.algorithm.success_threshold,
            seed=mix(self._args.run.seed, 0, 1),
            process=self._accelerator.process_index,
            processes=self._accelerator.num_processes,
        )

    def gap(self, permute: bool = False) -> Gap:
        """Measure the gap between teacher and student on selection tasks; every process measures the same.

        Args:
            permute: Whether each rollout gets the feedback of another task, as a control.
        """
        tasks = list(self._environment.tasks("selection"))[: self._args.eval.preflight_tasks]
        return measure_gap(
            self._sampler,
            tasks,
            self._args.rollout.num_generations,
            self._args.algorithm.threshold,
            mix(self._args.run.seed, 0, 0),
            self._sources,
            permute or self._args.feedback.permute,
        )
