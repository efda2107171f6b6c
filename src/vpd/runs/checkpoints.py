"""Writes, keeps, removes and loads the checkpoints and the best weights of a run."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedTokenizerBase

from vpd.config import RunSettings
from vpd.policy.load import load_weights, save_policy
from vpd.policy.verified import UnverifiedError, save_verified
from vpd.runs.files import RunError
from vpd.runs.folder import TRAINER_STATE, RunFolder, read_json
from vpd.runs.state import TrainingState


class Checkpoints:
    """Saves a run so that it can go on, and keeps the weights that did best on the selection split.

    A checkpoint holds what the accelerator knows of: weights, optimizer, random numbers, and all objects that were
    registered with it. Best weights are a model folder ``best-{step}`` beside the checkpoints. They stay as long as
    the run or one of its checkpoints names them, so that a run finds them from whichever checkpoint it resumes.

    All processes call each method together.

    Args:
        settings: The settings that name the folder and say how many checkpoints to keep.
        accelerator: Saves and loads what is registered with it.
        state: Tells the newest step and the best one; it is registered with the accelerator.
        model: The network whose weights are kept.
        tokenizer: The tokenizer that is saved beside best weights.

    Attributes:
        folder: The folder of the run, on the main process after :meth:`open`; None elsewhere.
    """

    def __init__(
        self,
        settings: RunSettings,
        accelerator: Accelerator,
        state: TrainingState,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.folder: RunFolder | None = None
        self._settings = settings
        self._accelerator = accelerator
        self._state = state
        self._model = model
        self._tokenizer = tokenizer

    def open(self, resume: bool | str | Path | None) -> Path | None:
        """Open ``run.output_dir``, load a checkpoint where asked, and forget what was written after it.

        Args:
            resume: False or None for a new run, True for the newest checkpoint where there is one, or the path of a
                checkpoint of this run, whose later checkpoints are then removed.

        Returns:
            The checkpoint that was loaded; None where the run begins.

        Raises:
            ConfigError: The folder cannot be used, holds a run that is not to be resumed, or has no such checkpoint.
        """
        chosen = None
        if self._accelerator.is_main_process:
            self.folder = RunFolder.open(self._settings.output_dir, resume=bool(resume))
            if resume:
                chosen = self.folder.latest_checkpoint() if resume is True else self.folder.checkpoint_at(resume)
        (chosen,) = broadcast_object_list([chosen])
        if chosen is not None:
            self._load(chosen)
        if self.folder is not None:
            self.folder.rewind(None if chosen is None else self._state.step)
        return chosen

    def _load(self, checkpoint: Path) -> None:
        """Load a checkpoint.

        Raises:
            RunError: It holds other parts than this run has.
        """
        try:
            self._accelerator.load_state(str(checkpoint))
        except ValueError as error:
            raise RunError(
                f"{checkpoint} cannot be gone on from: {error} It was written by another version of vpd, or with "
                "settings that need other parts: start a new run, or take that version."
            ) from error

    def save(self) -> None:
        """Save what a resume needs. All processes write into one folder, which then takes its name at once."""
        if self.folder is None:
            self._write(Path())
            return
        self.folder.commit_checkpoint(self._state.step, self._write, self._settings.save_total_limit)
        self._remove_stale_weights()

    def keep_best(self) -> Path:
        """Save the weights as those of the best step so far, and return their folder."""
        path = self._best()
        if self._accelerator.is_main_process:
            self._save_model(path)
            self._remove_stale_weights()
        self._accelerator.wait_for_everyone()
        return path

    def load_best(self) -> None:
        """Give the model the weights of the best step."""
        load_weights(self._model, self._best())

    def _write(self, folder: Path) -> None:
        (target,) = broadcast_object_list([str(folder)])
        self._accelerator.save_state(target)
        if self._accelerator.is_main_process:
            self._save_model(Path(target) / "model")
        self._accelerator.wait_for_everyone()

    def _save_model(self, folder: Path) -> None:
        """Write the weights as a model that transformers or PEFT load; not only a resume can use them then."""
        save = save_verified if self._settings.verify_saved else save_policy
        try:
            save(self._model, self._tokenizer, folder)  # pyright: ignore[reportArgumentType]
        except UnverifiedError as error:
            raise RunError(str(error)) from error

    def _best(self) -> Path:
        return Path(self._settings.output_dir) / f"best-{self._state.best_step}"

    def _remove_stale_weights(self) -> None:
        if self.folder is None:
            return
        states = (read_json(checkpoint / TRAINER_STATE) or {} for checkpoint in self.folder.checkpoints().values())
        self.folder.keep_best_weights({self._state.best_step, *(state.get("best_global_step") for state in states)})
