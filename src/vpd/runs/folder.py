"""The folder of a run holds everything that is known about it, in files that other tools read.

    config.json                    the resolved settings
    metrics.jsonl                  one JSON object a line: {"step": 3, "event": "train", "reward": 0.4, ...}
    rollouts/step-000012.parquet   sampled rollouts (see ``samples.py``)
    checkpoints/checkpoint-12/     what a resume needs
    best-12/                       the weights that did best on the selection split, where they are kept
    model/                         the trained model, in Hugging Face layout
    result.json                    the final table
    report.html                    the page made from the above

In a distributed run only the main process opens the folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vpd.config import ConfigError, VPDConfig
from vpd.runs.files import (
    TEMPORARY_PATTERN,
    RunError,
    atomic_write_text,
    disk_full_as_run_error,
    sync_folder,
    sync_tree,
)
from vpd.runs.samples import RolloutRecord, write_rollouts

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_BEST = re.compile(r"best-(\d+)")
_ROLLOUTS = re.compile(r"step-(\d+)\.parquet")

TRAINER_STATE = "trainer_state.json"
"""The name of the file in a checkpoint that holds transformers' ``TrainerState``."""


class RunFolder:
    """Opens the folder of a run, new or to be resumed, and writes its files.

    Args:
        path: The folder, which is created where it is missing. Files that are no part of a run are left alone.
        resume: Whether to go on with the run that the folder holds. A folder without one starts a new run.

    Raises:
        ConfigError: The folder holds a run and ``resume`` is off, or ``path`` is a file.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run.output_dir = {str(path)!r} is a file: choose another run.output_dir.")
        if self.holds_a_run() and not resume:
            raise ConfigError(
                f"{self.path} already holds a run. Go on with it by --resume, or choose another run.output_dir."
            )
        self._rollouts.mkdir(parents=True, exist_ok=True)
        self._checkpoints.mkdir(exist_ok=True)
        self._mend_interrupted_writes()

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def _rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def holds_a_run(self) -> bool:
        return self.config_path.exists() or self.metrics_path.exists() or self.latest_checkpoint() is not None

    @classmethod
    def open(cls, path: str | Path, resume: bool) -> RunFolder:
        """Open the folder of a run that is to begin, or to go on from a checkpoint.

        Raises:
            ConfigError: The folder cannot be used, or holds a run without a checkpoint.
        """
        try:
            folder = cls(path, resume=resume)
        except OSError as error:
            raise ConfigError(f"run.output_dir = {str(path)!r} cannot be used: {error}.") from error
        if resume and folder.holds_a_run() and folder.latest_checkpoint() is None:
            raise ConfigError(
                f"The run in {path} has no checkpoint to go on from (run.save_steps makes them): "
                "remove the folder, or choose another run.output_dir."
            )
        return folder

    def write_config(self, config: BaseModel | Mapping[str, Any]) -> str:
        """Write the resolved settings, and return in words those that differ from the ones that were written before."""
        values = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
        before = self.read_config()
        atomic_write_text(self.config_path, _json(values, indent=2) + "\n")
        return changed_settings(before, values) if before else ""

    def read_config(self) -> dict[str, Any] | None:
        """Read the settings that the folder's run began with; None where there are none yet."""
        return read_json(self.config_path)

    def log(self, step: int, event: str, values: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``. Numbers that are not finite are written as null.

        Args:
            step: The number of the rollout batch, from 1; 0 before the first.
            event: The kind: ``train``, ``eval``, ``gap``, ``warning``, ``warm_start``, ``stage``, or ``log`` for what
                a user logs.
            values: The values as a flat mapping; zero-dimensional arrays and tensors count as numbers.
        """
        line = _json({"step": step, "event": event, **values}) + "\n"
        with disk_full_as_run_error(self.metrics_path), open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(line)

    def write_rollouts(self, step: int, records: Sequence[RolloutRecord]) -> Path:
        """Write the step's sampled rollouts, in place of earlier ones of the same step."""
        path = self._rollouts / f"step-{step:06d}.parquet"
        write_rollouts(path, records)
        return path

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write the final table: ``{"rows": [{"name", "accuracy", "low", "high", "n", "seconds"}], ...}``."""
        atomic_write_text(self.result_path, _json(result, indent=2) + "\n")

    def rewind(self, step: int | None) -> None:
        """Forget what was written after ``step``, the one that the run resumes from (None forgets everything).

        Lines of ``step`` itself stay: write them before its checkpoint is committed.
        """
        if self.metrics_path.exists():
            kept = [entry for entry in read_metrics(self.path) if step is not None and entry.get("step", 0) <= step]
            atomic_write_text(self.metrics_path, "".join(_json(entry) + "\n" for entry in kept))
        for of_step, path in rollout_files(self.path).items():
            if step is None or of_step > step:
                path.unlink()
        for of_step, path in self.checkpoints().items():
            if step is None or of_step > step:
                self._remove_checkpoint(path)
        self.result_path.unlink(missing_ok=True)

    def checkpoints(self) -> dict[int, Path]:
        """Find the complete checkpoints by step, in ascending order."""
        return _numbered(self._checkpoints, _CHECKPOINT)

    def latest_checkpoint(self) -> Path | None:
        """Find the complete checkpoint with the highest step; None where there is none."""
        checkpoints = self.checkpoints()
        return checkpoints[max(checkpoints)] if checkpoints else None

    def checkpoint_at(self, path: str | Path) -> Path:
        """Find the checkpoint of this run that ``path`` names.

        Raises:
            ConfigError: This run has no such checkpoint.
        """
        for checkpoint in self.checkpoints().values():
            if checkpoint.resolve() == Path(path).expanduser().resolve():
                return checkpoint
        known = ", ".join(str(checkpoint) for checkpoint in self.checkpoints().values()) or "none yet"
        raise ConfigError(
            f"{path} is no checkpoint of the run in {self.path}, which has these: {known}. Name one of them, or resume "
            "with True for the newest. To begin with the weights of another run, give its model folder as the model."
        )

    def commit_checkpoint(self, step: int, write: Callable[[Path], None], keep: int) -> Path:
        """Let ``write`` fill a folder, make it ``checkpoints/checkpoint-{step}``, and keep the newest ``keep`` of all.

        A checkpoint under its final name is complete, whenever the process was killed.

        Args:
            step: The step after which a run resumed from it goes on.
            write: Fills the empty folder that it is given. What it raises is raised after the folder is removed.
            keep: How many checkpoints to keep, at least 1. The new one always stays.

        Raises:
            RunError: The disk is full. Earlier checkpoints are untouched.
        """
        final = self._checkpoints / f"checkpoint-{step}"
        new = self._checkpoints / f".new-{final.name}.tmp"
        _remove(new)
        try:
            with disk_full_as_run_error(final):
                new.mkdir()
                write(new)
                sync_tree(new)
        except BaseException:
            _remove(new)
            raise
        if final.exists():
            final.rename(self._old(final))
        new.rename(final)
        sync_folder(self._checkpoints)
        _remove(self._old(final))
        self._prune(final, keep)
        return final

    def remove_weights(self) -> None:
        """Remove the model, the best weights and the checkpoints; what was measured stays."""
        best = _numbered(self.path, _BEST)
        for path in (self.path / "model", *best.values(), *self.checkpoints().values()):
            _remove(path)

    def keep_best_weights(self, steps: Iterable[int | None]) -> None:
        """Remove the best weights of all steps but these."""
        kept = set(steps)
        for step, path in _numbered(self.path, _BEST).items():
            if step not in kept:
                _remove(path)

    def _prune(self, newest: Path, keep: int) -> None:
        others = self.checkpoints()
        del others[checkpoint_step(newest)]
        for step in sorted(others, reverse=True)[max(keep - 1, 0) :]:
            self._remove_checkpoint(others[step])

    def _remove_checkpoint(self, checkpoint: Path) -> None:
        # It is renamed first, so that a folder whose removal is interrupted is not taken for a checkpoint.
        _remove(checkpoint.rename(self._checkpoints / f".pruned-{checkpoint.name}.tmp"))

    def _mend_interrupted_writes(self) -> None:
        for old in self._checkpoints.glob(".old-*.tmp"):
            final = self._checkpoints / old.name.removeprefix(".old-").removesuffix(".tmp")
            if not final.exists():
                old.rename(final)
        for folder in (self.path, self._rollouts, self._checkpoints):
            for leftover in folder.glob(TEMPORARY_PATTERN):
                _remove(leftover)

    def _old(self, checkpoint: Path) -> Path:
        return self._checkpoints / f".old-{checkpoint.name}.tmp"


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List in words the settings that differ between two configs; the text is empty where none do.

    A setting that did not exist yet when ``before`` was written counts as its default.
    """
    # Where a setting of the old config is no longer known, its values are compared as they were written.
    with contextlib.suppress(ConfigError):
        before = VPDConfig.parse(dict(before)).model_dump(mode="json")
    old, new = _flat(_plain(before)), _flat(_plain(now))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in changed)


def checkpoint_step(path: Path) -> int:
    """Read the step from the name of a checkpoint's folder."""
    match = _CHECKPOINT.fullmatch(path.name)
    if match is None:
        raise RunError(f"{path} is not a checkpoint: its name should be checkpoint-<step>.")
    return int(match[1])


def read_json(path: Path) -> dict[str, Any] | None:
    """Read the object in a JSON file; None where there is no file.

    Raises:
        RunError: The file holds something else.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise RunError(f"{path} should hold a JSON object, not a {type(values).__name__}.")
    return values


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Read the entries of ``metrics.jsonl`` in their order, without a line that an interruption has cut off."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def rollout_files(folder: str | Path) -> dict[int, Path]:
    """Find the files of sampled rollouts by step, in the steps' order."""
    return _numbered(Path(folder) / "rollouts", _ROLLOUTS)


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _json(values: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(values), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    """Turn a value into one that JSON can hold: no array types, and no NaN or infinity, which other parsers refuse."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0:
        return _plain(value.item())
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no place in a run's JSON files: {value!r}")
