"""Puts the methods that users of transformers' Trainer and of TRL know around the parts of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedTokenizerBase, TrainerCallback

from vpd.config import ConfigError, VPDConfig
from vpd.environments import SPLITS, Environment, Split
from vpd.policy.load import save_policy
from vpd.policy.verified import save_verified
from vpd.runs.files import RunError
from vpd.runs.finite import require_finite
from vpd.runs.hub import upload_model, with_license
from vpd.runs.model_card import BaseModel, base_model_of, write_model_card
from vpd.setup import Parts


class BaseTrainer:
    """Evaluates, saves, uploads and logs as transformers' ``Trainer`` does.

    Args:
        args: All settings.
        environment: Holds the tasks and judges completions.
        processing_class: The tokenizer.
        parts: The parts of the run, each of which becomes an attribute of the same name.

    Attributes:
        model: The network, without the accelerator's wrapping.
        optimizer: The optimizer of both the E-step and the M-step.
        lr_scheduler: The learning rate's schedule, which advances once a rollout batch.
        state: The ``TrainerState`` of transformers; a step is a rollout batch.
        run_state: The numbers that a resumed run goes on from and that ``state`` does not hold.
    """

    def __init__(
        self, args: VPDConfig, environment: Environment, processing_class: PreTrainedTokenizerBase, parts: Parts
    ) -> None:
        self.args = args
        self.environment = environment
        self.processing_class = processing_class
        self.algorithm = parts.algorithm
        self.accelerator = parts.accelerator
        self.learner = parts.learner
        self.model = parts.learner.module.model
        self.optimizer = parts.learner.optimizer
        self.lr_scheduler = parts.lr_scheduler
        self.prompts = parts.prompts
        self.sampler = parts.sampler
        self.sources = parts.sources
        self.curriculum = parts.curriculum
        self.evaluator = parts.evaluator
        self.run_state = parts.run_state
        self.journal = parts.journal
        self.monitor = parts.monitor
        self.measurements = parts.measurements
        self.checkpoints = parts.checkpoints
        self.callbacks = parts.callbacks
        self.state = parts.callbacks.state

    def evaluate(
        self, split: Split = "selection", limit: int | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the policy's accuracy as it is now, with the settings in ``args.eval``. Call this on all processes.

        Args:
            split: The split: ``selection``, ``final`` or ``train``.
            limit: How many of its tasks to ask, from the first on; all by default.
            metric_key_prefix: The prefix of each key of the result.

        Returns:
            ``eval_accuracy``, the mean share of successes among a task's completions (nan where nothing could be
            graded); ``eval_low`` and ``eval_high``, its 95% interval; ``eval_reward``, the mean reward; ``eval_n``, the
            number of graded tasks; ``eval_ungraded``, the number of tasks on which the judge failed; and
            ``eval_seconds``. The same numbers are logged and passed to the callbacks' ``on_evaluate``.

        Raises:
            ConfigError: There is no such split.
        """
        if split not in SPLITS:
            raise ConfigError(f"There is no split {split!r}: give one of {', '.join(SPLITS)}.")
        self.sampler.engine.sync()
        evaluation = self.measurements.accuracy(split, limit)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in evaluation.summary().items()}
        self._show(metrics)
        self.callbacks.evaluate(metrics)
        return metrics

    def log(self, logs: Mapping[str, Any]) -> None:
        """Log numbers under the newest step.

        They go to ``state.log_history``, to the callbacks' ``on_log``, to the trackers, and into ``metrics.jsonl`` as
        an event ``log``.
        """
        self.journal.log(self.run_state.step, "log", logs)
        self._show(logs)

    def _show(self, logs: Mapping[str, Any]) -> None:
        self.journal.track(self.run_state.step, logs)
        self.callbacks.log(logs)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Add a callback, or make one of the given class and add it."""
        self.callbacks.handler.add_callback(callback)

    def pop_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> TrainerCallback | None:
        """Remove a callback, or the first one of the given class, and return it; None where there is none."""
        return self.callbacks.handler.pop_callback(callback)

    def remove_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Remove a callback, or the first one of the given class."""
        self.callbacks.handler.remove_callback(callback)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the model, the tokenizer and a model card in Hugging Face layout. Call this on all processes.

        Args:
            output_dir: A folder that is new, empty, or holds a model, which is replaced; by default ``model`` in
                ``run.output_dir``. An adapter is saved without its base model.

        Raises:
            RunError: Weights are not finite, or the folder cannot be written, or it holds other things than a model.
        """
        if self.accelerator.is_main_process:
            self._write_model(Path(output_dir or self._model_folder), base_model_of(self.model))
        self.accelerator.wait_for_everyone()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "End of training",
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo | None:
        """Save the model with its card, and upload it to the Hugging Face hub. Call this on all processes.

        Args:
            repo_id: The repository as ``owner/name``, or the name alone for the token's owner. It is made where it is
                missing.
            private: Whether a new repository is private; None for the owner's default.
            token: The token of a user who may write there; None for the one that ``hf auth login`` has stored.
            commit_message: The message of the one commit that is made.
            revision: The branch, which is made where it is missing; None for the main one.
            create_pr: Whether to open a pull request instead of committing.

        Returns:
            The commit; None on other processes than the main one.

        Raises:
            RunError: The model cannot be saved.
            huggingface_hub.errors.HfHubHTTPError: The hub refuses.
        """
        self.callbacks.push_begin()
        commit = None
        if self.accelerator.is_main_process:
            self._write_model(self._model_folder, with_license(base_model_of(self.model), token))
            commit = upload_model(
                self._model_folder,
                repo_id,
                private=private,
                token=token,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        self.accelerator.wait_for_everyone()
        return commit

    @property
    def _model_folder(self) -> Path:
        return Path(self.args.run.output_dir) / "model"

    def _write_model(self, folder: Path, base: BaseModel) -> None:
        require_finite(self.model, f"The model in {folder}")
        try:
            save = save_verified if self.args.run.verify_saved else save_policy
            save(self.model, self.processing_class, folder, keep_base=True)  # pyright: ignore[reportArgumentType]
            write_model_card(folder, self.args, base, self.run_state.rows, self.run_state.step)
        except OSError as error:
            raise RunError(str(error)) from error
