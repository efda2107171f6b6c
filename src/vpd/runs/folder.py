"""The folder of a run holds everything that is known about it, in files that other tools read.

    config.json                    the resolved settings
    metrics.jsonl                  one JSON object a line: {"step": 3, "event": "train", "reward": 0.4, ...}
    rollouts/step-000012.parquet   sampled rollouts (see ``samples.py``)
    checkpoints/checkpoint-12/     what a resume needs
    best-12/                       the weights that did best on the selection split, where they are kept
    skipped/step-000012.parquet    all rollouts of a step with an update that was skipped
    model/                         the trained model, in Hugging Face layout
    result.json                    the final table
    report.html                    the page made from the above
    run.lock                       the process that runs here, while it does

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
    TEMPORARY_PATTERNS,
    RunError,
    atomic_write_bytes,
    atomic_write_text,
    sync_folder,
    sync_tree,
    write_errors_as_run_errors,
)
from vpd.runs.json_files import as_json, plain, read_json, write_checked_json
from vpd.runs.lock import RunLock
from vpd.runs.manifest import checksum_of, write_manifest
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
        self._lock: RunLock | None = None
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run.output_dir = {str(path)!r} is a file: choose another run.output_dir.")
        if self.holds_a_run() and not resume:
            raise ConfigError(
                f"{self.path} already holds a run. Go on with it by --resume, or choose another run.output_dir."
            )
        self._rollouts.mkdir(parents=True, exist_ok=True)
        self._checkpoints.mkdir(exist_ok=True)

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
    def _skipped(self) -> Path:
        return self.path / "skipped"

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def holds_a_run(self) -> bool:
        return self.config_path.exists() or self.metrics_path.exists() or self.latest_checkpoint() is not None

    @classmethod
    def open(cls, path: str | Path, resume: bool) -> RunFolder:
        """Open and lock the folder of a run that is to begin or to go on, and mend what a killed process left.

        :meth:`close` ends the lock.

        Raises:
            ConfigError: The folder cannot be used, or another process runs there.
        """
        lock = None
        try:
            folder = cls(path, resume)
            lock = RunLock(folder.path)
            # Another process may have begun a run there since.
            folder = cls(path, resume)
            folder._mend_interrupted_writes()
        except BaseException as error:
            if lock is not None:
                lock.release()
            if isinstance(error, OSError):
                raise ConfigError(f"run.output_dir = {str(path)!r} cannot be used: {error}.") from error
            raise
        folder._lock = lock
        return folder

    def close(self) -> None:
        """Let other processes use a folder that was opened by :meth:`open`."""
        if self._lock is not None:
            self._lock.release()

    def write_config(self, config: BaseModel | Mapping[str, Any]) -> str:
        """Write the resolved settings, and return in words those that differ from the ones that were written before."""
        values = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
        changed = self.changes_of(values)
        atomic_write_text(self.config_path, as_json(values, indent=2) + "\n")
        return changed

    def changes_of(self, values: Mapping[str, Any]) -> str:
        """Return in words the settings that differ from the written ones; the text is empty where none do."""
        try:
            before = self.read_config()
        except RunError:
            return f"nobody can tell which, since {self.config_path} is damaged"
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
        line = as_json({"step": step, "event": event, **values}) + "\n"
        with write_errors_as_run_errors(self.metrics_path), open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(line)

    def write_rollouts(self, step: int, records: Sequence[RolloutRecord]) -> Path:
        """Write the step's sampled rollouts, in place of earlier ones of the same step."""
        path = self._rollouts / f"step-{step:06d}.parquet"
        write_rollouts(path, records)
        return path

    def write_skipped(self, step: int, records: Sequence[RolloutRecord]) -> Path:
        """Write all rollouts of a step with an update that was skipped, for inspection."""
        self._skipped.mkdir(exist_ok=True)
        path = self._skipped / f"step-{step:06d}.parquet"
        write_rollouts(path, records)
        return path

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write the final table: ``{"rows": [{"name", "accuracy", "low", "high", "n", "seconds"}], ...}``."""
        write_checked_json(self.result_path, result)

    def rewind(self, step: int | None, mark: Mapping[str, Any] | None = None) -> bool:
        """Forget what was written after ``step``, the one that the run resumes from (None forgets everything).

        Args:
            step: The step.
            mark: What :meth:`commit_checkpoint` noted of ``metrics.jsonl``. Without it, lines of ``step`` stay.

        Returns:
            Whether ``metrics.jsonl`` is as it was at the mark; otherwise only its readable lines up to ``step`` stay.
        """
        data = self.metrics_path.read_bytes() if self.metrics_path.exists() else b""
        kept = b"" if mark is None else data[: mark["bytes"]]
        is_whole = mark is None or checksum_of(kept) == mark["sha256"]
        if mark is None or not is_whole:
            entries = [entry for entry in read_metrics(self.path) if step is not None and _step_of(entry) <= step]
            kept = "".join(as_json(entry) + "\n" for entry in entries).encode()
        if kept != data:
            atomic_write_bytes(self.metrics_path, kept)
        for kind in (self._rollouts, self._skipped):
            for of_step, path in _numbered(kind, _ROLLOUTS).items():
                if step is None or of_step > step:
                    path.unlink()
        for of_step, path in self.checkpoints().items():
            if step is None or of_step > step:
                self._remove_checkpoint(path)
        self.result_path.unlink(missing_ok=True)
        return is_whole

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

        A checkpoint under its final name is complete, whenever the process was killed, and its manifest tells whether
        it still is. What ``metrics.jsonl`` holds at that time lasts through a power cut, too.

        Args:
            step: The step after which a run resumed from it goes on.
            write: Fills the empty folder that it is given. What it raises is raised after the folder is removed.
            keep: How many checkpoints to keep, at least 1. The new one always stays.

        Raises:
            RunError: The folder cannot be written, or the disk is full. Earlier checkpoints are untouched.
        """
        final = self._checkpoints / f"checkpoint-{step}"
        new = self._checkpoints / f".new-{final.name}.tmp"
        with write_errors_as_run_errors(final):
            _remove(new)
            try:
                new.mkdir()
                write(new)
                write_manifest(new, {"step": step, "metrics": self._mark_metrics()})
                sync_tree(new)
            except BaseException:
                # Where nothing can be written, nothing can be removed either.
                with contextlib.suppress(OSError):
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

    def _mark_metrics(self) -> dict[str, Any]:
        """Make ``metrics.jsonl`` last through a power cut, and note its length and checksum."""
        if not self.metrics_path.exists():
            return {"bytes": 0, "sha256": checksum_of(b"")}
        with open(self.metrics_path, "rb") as file:
            os.fsync(file.fileno())
            data = file.read()
        return {"bytes": len(data), "sha256": checksum_of(data)}

    def _mend_interrupted_writes(self) -> None:
        for old in self._checkpoints.glob(".old-*.tmp"):
            final = self._checkpoints / old.name.removeprefix(".old-").removesuffix(".tmp")
            if not final.exists():
                old.rename(final)
        for folder in (self.path, self._rollouts, self._skipped, self._checkpoints):
            for leftover in (path for pattern in TEMPORARY_PATTERNS for path in folder.glob(pattern)):
                _remove(leftover)

    def _old(self, checkpoint: Path) -> Path:
        return self._checkpoints / f".old-{checkpoint.name}.tmp"


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List in words the settings that differ between two configs; the text is empty where none do.

    A setting that did not exist yet when ``before`` was written counts as its default. ``run.output_dir`` is left out,
    since a run's folder may be moved.
    """
    # Where a setting of the old config is no longer known, its values are compared as they were written.
    with contextlib.suppress(ConfigError):
        before = VPDConfig.parse(dict(before)).model_dump(mode="json")
    old, new = _flat(plain(before)), _flat(plain(now))
    keys = sorted((old.keys() | new.keys()) - {"run.output_dir"})
    changed = [key for key in keys if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in changed)


def checkpoint_step(path: Path) -> int:
    """Read the step from the name of a checkpoint's folder."""
    match = _CHECKPOINT.fullmatch(path.name)
    if match is None:
        raise RunError(f"{path} is not a checkpoint: its name should be checkpoint-<step>.")
    return int(match[1])


def _step_of(entry: Mapping[str, Any]) -> float:
    step = entry.get("step")
    return step if isinstance(step, int | float) else math.inf


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
