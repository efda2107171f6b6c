"""Writes, keeps, removes and loads the checkpoints and the best weights of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from vpd.config import ConfigError, RunSettings
from vpd.policy.load import load_weights, save_policy
from vpd.policy.verified import UnverifiedError, save_verified
from vpd.runs.files import RunError, sync_tree, write_errors_as_run_errors
from vpd.runs.finite import require_finite
from vpd.runs.folder import TRAINER_STATE, RunFolder
from vpd.runs.json_files import read_json
from vpd.runs.manifest import MANIFEST, DamageError, checked_manifest, write_manifest
from vpd.runs.random_states import random_states, set_random_states
from vpd.runs.state import TrainingState
from vpd.runs.state_files import read_state, write_state

_RANDOM = "random"
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class Stateful(Protocol):
    """A part of a run that a checkpoint keeps: its state is a tree of numbers, texts and tensors."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class StateFile(Protocol):
    """A part of a run that writes its own file into a checkpoint, and reads it."""

    def save_state(self, folder: Path) -> None: ...

    def load_state(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Opened:
    """What was found in a run's folder.

    Attributes:
        checkpoint: The checkpoint that was loaded; None where the run begins.
        damaged: A sentence on each newer checkpoint that was passed over, and on what else is damaged.
        began_before: Whether the folder holds a run, with a checkpoint or without.
    """

    checkpoint: Path | None = None
    damaged: list[str] = field(default_factory=list)
    began_before: bool = False


class Checkpoints:
    """Saves a run so that it can go on, and keeps the weights that did best on the selection split.

    A checkpoint holds the state of each part as JSON and safetensors, the random numbers of all processes,
    transformers' ``TrainerState``, and a manifest with the checksum of every file. Nothing in it is code, and nothing
    of it is loaded before all checksums fit. Best weights are a model folder ``best-{step}`` beside the checkpoints.
    They stay as long as the run or one of its checkpoints names them, so that a run finds them from whichever
    checkpoint it resumes.

    All processes call each method together. The main one writes, and all read.

    Args:
        settings: The settings that name the folder and say how many checkpoints to keep.
        accelerator: Knows the processes.
        state: Tells the newest step and the best one.
        parts: The parts of the run whose state is kept, by name.
        trainer_state: Writes and reads transformers' ``TrainerState``.
        model: The network whose best weights are kept.
        tokenizer: The tokenizer that is saved beside best weights.

    Attributes:
        folder: The folder of the run, on the main process after :meth:`open`; None elsewhere.

    Raises:
        ConfigError: The weights are sharded over processes, which this way of saving does not gather.
    """

    def __init__(
        self,
        settings: RunSettings,
        accelerator: Accelerator,
        state: TrainingState,
        parts: Mapping[str, Stateful],
        trainer_state: StateFile,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        if accelerator.distributed_type in _SHARDED:
            raise ConfigError(
                f"Weights that are sharded over processes ({accelerator.distributed_type.value}) cannot be saved: "
                "start the processes with data parallelism alone (accelerate launch --multi_gpu, or torchrun)."
            )
        self.folder: RunFolder | None = None
        self._settings = settings
        self._accelerator = accelerator
        self._state = state
        self._parts = parts
        self._trainer_state = trainer_state
        self._model = model
        self._tokenizer = tokenizer
        self._manifest: dict[str, Any] = {}
        self._saved_step = -1
        self._saved_at = time.monotonic()

    def open(self, resume: bool | str | Path | None) -> Opened:
        """Open and lock ``run.output_dir``, and load a checkpoint where asked.

        Args:
            resume: False or None for a new run, True for the newest sound checkpoint where there is one, or the path of
                a checkpoint of this run.

        Raises:
            ConfigError: The folder cannot be used, another process runs there, it holds a run that is not to be
                resumed, or it has no such checkpoint.
            RunError: No checkpoint is sound, or the one that was named is not.
        """
        opened = Opened()
        if self._accelerator.is_main_process:
            self.folder = RunFolder.open(self._settings.output_dir, resume=bool(resume))
            if resume:
                opened = _choose(self.folder, True if resume is True else resume)
        (opened,) = broadcast_object_list([opened])
        self._saved_at = time.monotonic()
        if opened.checkpoint is not None:
            self._load(opened.checkpoint)
            self._saved_step = self._state.step
            self._manifest = read_json(opened.checkpoint / MANIFEST) or {}
        return opened

    def rewind(self) -> str | None:
        """Forget what was written after the checkpoint that was loaded, or all of an earlier run where there was none.

        Returns:
            What is wrong with the metrics up to there, in words; None where nothing is.
        """
        if self.folder is None:
            return None
        step = None if self._saved_step < 0 else self._state.step
        if self.folder.rewind(step, self._manifest.get("metrics")):
            return None
        return (
            f"{self.folder.metrics_path} is not as it was at checkpoint-{step}: it was changed or damaged. What can be "
            "read of it up to there is kept."
        )

    def close(self) -> None:
        """Let other processes use the folder."""
        if self.folder is not None:
            self.folder.close()

    def _load(self, checkpoint: Path) -> None:
        """Load a checkpoint.

        Raises:
            RunError: It holds other parts than this run has.
        """
        try:
            found = {path.stem for path in checkpoint.glob("*.json")} - {_RANDOM, MANIFEST[:-5], TRAINER_STATE[:-5]}
            if other := sorted(found ^ self._parts.keys()):
                raise ValueError(f"it {'holds' if other[0] in found else 'lacks'} the state of {other[0]}.")
            self._trainer_state.load_state(checkpoint)
            for name, part in self._parts.items():
                part.load_state_dict(read_state(checkpoint, name))
            states, process = read_state(checkpoint, _RANDOM), self._accelerator.process_index
            # With more processes than before, the further ones have their seeds.
            if process < len(states):
                set_random_states(states[process])
        except (RunError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise RunError(
                f"{checkpoint} cannot be gone on from: {error} It was written by another version of vpd, or with "
                "settings that need other parts: start a new run, or take that version."
            ) from error

    @property
    def is_due(self) -> bool:
        """Whether ``run.save_minutes`` have gone by since a checkpoint; False where ``run.save_steps`` is set."""
        minutes = self._settings.save_minutes
        waited = time.monotonic() - self._saved_at
        return self._settings.save_steps is None and 0 < minutes * 60 <= waited

    @property
    def is_saved(self) -> bool:
        """Whether the newest step has a checkpoint, or there is no step yet."""
        return self._state.step in (0, self._saved_step)

    def save(self) -> None:
        """Save what a resume needs: the main process writes a folder, which then takes its name at once.

        Raises:
            RunError: Weights are not finite, or the folder cannot be written. Earlier checkpoints are untouched.
        """
        what = f"checkpoint-{self._state.step}"
        require_finite(self._model, what)
        # Gathered as a list of one, which accelerate joins to the list of all processes.
        states = gather_object([random_states()])
        failure: list[str | None] = [None]
        if self.folder is not None:
            try:
                self.folder.commit_checkpoint(
                    self._state.step, lambda folder: self._write(folder, states), self._settings.save_total_limit
                )
                self._remove_stale_weights()
            except RunError as error:
                failure = [str(error)]
        (reason,) = broadcast_object_list(failure)
        if reason is not None:
            raise RunError(reason)
        self._saved_step, self._saved_at = self._state.step, time.monotonic()

    def _write(self, folder: Path, states: list[dict[str, Any]]) -> None:
        for name, part in self._parts.items():
            write_state(folder, name, part.state_dict())
        write_state(folder, _RANDOM, states)
        self._trainer_state.save_state(folder)
        self._save_model(folder / "model")

    def keep_best(self) -> Path:
        """Save the weights as those of the best step so far, and return their folder.

        Raises:
            RunError: Weights are not finite, or the folder cannot be written.
        """
        path = self._best()
        require_finite(self._model, path.name)
        if self._accelerator.is_main_process:
            with write_errors_as_run_errors(path):
                self._save_model(path)
                write_manifest(path, {})
                sync_tree(path)
            self._remove_stale_weights()
        self._accelerator.wait_for_everyone()
        return path

    def load_best(self) -> None:
        """Give the model the weights of the best step.

        Raises:
            RunError: They are damaged.
        """
        path = self._best()
        try:
            _check_weights(path)
            load_weights(self._model, path)
        except (DamageError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as damage:
            raise RunError(
                f"The best weights in {path} cannot be loaded: {damage}. Go on with --resume, from a checkpoint whose "
                "best weights are whole, or set eval.load_best_model_at_end = false to end with the newest weights."
            ) from damage

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
        named = {_best_step(checkpoint) for checkpoint in self.folder.checkpoints().values()}
        self.folder.keep_best_weights({self._state.best_step, *named})


def _choose(folder: RunFolder, resume: Literal[True] | str | Path) -> Opened:
    """Find the checkpoint to go on from: the one that is named, or the newest that is sound.

    Raises:
        ConfigError: There is no such checkpoint.
        RunError: None is sound.
    """
    began = folder.holds_a_run()
    named = None if resume is True else folder.checkpoint_at(resume)
    damaged = []
    for checkpoint in reversed(folder.checkpoints().values()) if named is None else [named]:
        problem = _problem_of(checkpoint)
        if problem is None:
            return Opened(checkpoint, damaged, began)
        damaged.append(f"{checkpoint} cannot be gone on from: {problem}.")
    if damaged:
        others = "Name another one, or resume from the newest" if named else "No checkpoint of this run is sound"
        raise RunError(
            f"{' '.join(damaged)} {others}: restore its files, or start a new run in another run.output_dir."
        )
    return Opened(None, damaged, began)


def _problem_of(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, or with the best weights that belong to it; None where nothing is."""
    try:
        if checked_manifest(checkpoint)["step"] != int(checkpoint.name.rpartition("-")[2]):
            return f"{MANIFEST} is of another step"
    except DamageError as damage:
        return str(damage)
    except (KeyError, TypeError):
        return f"{MANIFEST} is of no checkpoint"
    best = _best_step(checkpoint, kept=True)
    if best is None:
        return None
    weights = checkpoint.parents[1] / f"best-{best}"
    try:
        _check_weights(weights)
    except DamageError as damage:
        return f"of its best weights in {weights.name}, {damage}"
    return None


def _check_weights(folder: Path) -> None:
    """Raise DamageError unless a folder of best weights is as it was written.

    A run writes safetensors alone. Weights in a pickle, which transformers would load too, come from somewhere else.
    """
    for name in checked_manifest(folder)["files"]:
        if Path(name).suffix in _PICKLES:
            raise DamageError(f"{name} is a pickle, which no run writes")


def _best_step(checkpoint: Path, kept: bool = False) -> int | None:
    """The best step that a checkpoint names; with ``kept``, None unless its weights were kept."""
    try:
        state = read_json(checkpoint / TRAINER_STATE) or {}
    except RunError:
        return None
    return None if kept and state.get("best_model_checkpoint") is None else state.get("best_global_step")
