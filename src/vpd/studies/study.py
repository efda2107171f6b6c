"""A study: several settings (arms) by several seeds, all from one shared start.

    config = "quickstart.toml"          # of all arms, relative to this file
    output_dir = "runs/compare"
    seeds = [0, 1, 2]
    set = ["run.max_steps=60"]          # for all arms, as in vpd train --set

    [[arms]]
    name = "VPD"

    [[arms]]
    name = "SDPO"
    set = ['algorithm={type="sdpo"}']

The start is one run without training steps: it makes the warm start, and every arm begins with its model. Every run is
a process of its own with a folder of its own. A study that was interrupted goes on where it stopped: finished runs are
kept, the others go on from their newest checkpoint.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator

from vpd.config import ConfigError, Section, VPDConfig, sentences_of
from vpd.machine import usable_cores
from vpd.runs.files import RunError
from vpd.runs.folder import RunFolder, changed_settings, read_json


class Arm(Section):
    name: str = Field(min_length=1)
    """As the table and the plots have it."""
    set: list[str] = Field(default_factory=list)
    """``section.key=value`` or ``section={...}``, on top of the study's."""


class Study(Section):
    config: str
    """The TOML file of settings that all arms share, relative to the study's file."""
    output_dir: str
    """Where the runs, the table and the plots go, from where the command is run. Studies with one ``output_dir`` share
    its start and the runs that they have in common."""
    report_dir: str | None = None
    """Where the table and the plots go instead: each of several studies with one ``output_dir`` needs its own."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """``run.seed`` of the runs; every arm has a run of each."""
    set: list[str] = Field(default_factory=list)
    """``section.key=value`` or ``section={...}``, for all arms and the start."""
    split: Literal["final", "selection"] = "final"
    """Whose questions the table is about. ``selection`` is for tuning: its last evaluation counts
    (``eval.eval_steps``), and the final questions are not asked."""
    keep_models: bool = True
    """Keep the model, the best weights and the checkpoints of finished runs; without them the figures stay."""
    arms: list[Arm] = Field(min_length=1)
    """The first is the one that the others are compared with."""

    @model_validator(mode="after")
    def _distinct(self) -> Study:
        folders = [_folder_name(arm.name) for arm in self.arms]
        for index, name in enumerate(folders):
            if "|" in self.arms[index].name:
                raise ValueError(f"the arm {self.arms[index].name!r} would break its table: leave the | out")
            if name in ("", START) or name in folders[:index]:
                raise ValueError(
                    f"the arm {self.arms[index].name!r} would share its folder {name!r}: give each a name of its own"
                )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds} names one twice")
        return self

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read a TOML file.

        Raises:
            ConfigError: the file is missing or malformed, or settings in it are wrong.
        """
        try:
            study = cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"The study {path} cannot be read: {error}.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}.") from None
        except ValidationError as error:
            raise ConfigError("\n".join(sentences_of(error, str(path), cls))) from None
        study.config = str(path.parent / study.config)
        return study


START = "start"
"""Folder of the run that all arms begin with."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study: the settings on top of the study's config, and its folder."""

    name: str
    folder: Path
    overrides: list[str]

    def settings(self, config: str) -> VPDConfig:
        """The run's settings in full."""
        return VPDConfig.load(config, self.overrides)

    def is_finished(self) -> bool:
        result = read_json(self.folder / "result.json")
        return result is not None and result.get("interrupted") is None

    def forget_what_cannot_go_on(self) -> None:
        """Remove a run that was cut off before its first checkpoint; another folder is refused."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        folder = RunFolder(self.folder, resume=True)
        if not folder.holds_a_run():
            raise ConfigError(f"{self.folder} is in the way: {self.name} would be written there, and it holds no run.")
        if folder.latest_checkpoint() is None:
            shutil.rmtree(self.folder)


def start_of(study: Study) -> PlannedRun:
    """The run that makes the shared start, and measures it."""
    folder = Path(study.output_dir) / START
    return PlannedRun(START, folder, [*_of_all(study), "run.max_steps=0", f"run.output_dir={_quoted(folder)}"])


def runs_of(study: Study, arm: Arm) -> list[PlannedRun]:
    """The runs of an arm, one a seed.

    An arm's own settings come last: one that names another model leaves the shared start, and one that sets a warm
    start makes it on top of the shared one.
    """
    begins = [f"model.name={_quoted(start_of(study).folder / 'model')}", "warm_start.demonstrations=0"]
    runs = []
    for seed in study.seeds:
        folder = Path(study.output_dir) / _folder_name(arm.name) / f"seed-{seed}"
        own = [f"run.seed={seed}", f"warm_start.seed={seed}", "eval.eval_on_start=false"]
        place = f"run.output_dir={_quoted(folder)}"
        runs.append(PlannedRun(f"{arm.name}, seed {seed}", folder, [*_of_all(study), *begins, *own, *arm.set, place]))
    return runs


def _of_all(study: Study) -> list[str]:
    return [*study.set, *(["eval.final_tasks=0"] if study.split == "selection" else [])]


def run_study(study: Study, workers: int = 1, say: Callable[[str], None] = print) -> None:
    """Run what is not finished yet; the runs' own lines go to a file beside each run's folder, such as ``seed-0.log``.

    SIGINT and SIGTERM are handed on to the runs under way, which save a checkpoint and end.

    Args:
        study: what to run.
        workers: runs at the same time; where there are several GPUs, each takes the next one, and where there is none,
            each takes its share of the processor's cores.
        say: is told of each run that begins and ends.

    Raises:
        ConfigError: settings of an arm are wrong, or a run was begun with others. Nothing has been run then.
        RunError: a run failed; no further one is begun. Or the study is being run already.
        KeyboardInterrupt: after a signal, when the runs under way have ended.
    """
    start = start_of(study)
    runs = [run for arm in study.arms for run in runs_of(study, arm)]
    for run in (start, *runs):
        _check(run, study, start)
    with _locked(Path(study.output_dir)), _Pool(study.config, workers, say) as pool:
        pool.run_all([start])
        if not study.keep_models:
            # Of runs that finished before this was set, or whose study was killed before it got to it.
            for run in runs:
                if run.is_finished():
                    _remove_weights(run)
        pool.run_all(runs, then=None if study.keep_models else _remove_weights)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder, so that two studies cannot write the same runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"The study in {folder} is being run already, by another process.") from None
        yield


class _Pool:
    """Runs in processes of their own, several at a time. Once one fails or a signal comes, no further one begins."""

    def __init__(self, config: str, workers: int, say: Callable[[str], None]) -> None:
        self._config = config
        self._workers = workers
        self._say = say
        self._stopped = threading.Event()
        self._signal: int | None = None
        self._running: set[subprocess.Popen[bytes]] = set()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Pool:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._hand_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run_all(self, runs: Sequence[PlannedRun], then: Callable[[PlannedRun], None] | None = None) -> None:
        """Run what is not finished yet, and call ``then`` with each run that now is."""
        unfinished = [run for run in runs if not run.is_finished()]
        # A run that is alone has the whole machine.
        workers = max(1, min(self._workers, len(unfinished)))
        environments: SimpleQueue[dict[str, str]] = SimpleQueue()
        for index in range(workers):
            environments.put(_environment(index, workers))
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self._run, run, environments, then) for run in unfinished]
        if self._signal is not None:
            raise KeyboardInterrupt
        for future in futures:
            future.result()

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._stopped.set()
        for process in list(self._running):
            process.send_signal(number)

    def _run(
        self,
        run: PlannedRun,
        environments: SimpleQueue[dict[str, str]],
        then: Callable[[PlannedRun], None] | None,
    ) -> None:
        if self._stopped.is_set():
            return
        run.forget_what_cannot_go_on()
        log = run.folder.with_name(f"{run.folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        changes = [part for override in run.overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "vpd.cli", "train", self._config, "--resume", *changes]
        environment = environments.get()
        self._say(f"{run.name} begins; its log is {log}.")
        with open(log, "ab") as file:
            # In a group of its own: a terminal's Ctrl-C comes once, through this process, and not twice.
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(os.environ) | environment,
                start_new_session=True,
            )
            self._running.add(process)
            if self._signal is not None:
                process.send_signal(self._signal)
            code = process.wait()
        self._running.discard(process)
        environments.put(environment)
        if code and self._signal is None:
            self._stopped.set()
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = lines[-1] if lines else ""
            raise RunError(f"{run.name} ended with exit code {code}: {last} All of it is in {log}.")
        if then is not None and run.is_finished():
            then(run)
        self._say(f"{run.name} is {'interrupted' if code else 'done'}.")


def _remove_weights(run: PlannedRun) -> None:
    RunFolder(run.folder, resume=True).remove_weights()


def _environment(worker: int, workers: int) -> dict[str, str]:
    """What a worker's runs find in their environment, so that runs at the same time share the machine.

    Of several GPUs a worker gets its own. Without a GPU it gets as many threads as it has cores: with more, the
    threads of one run wait for a core that another's holds, and every product of matrices waits for them.
    """
    count = torch.cuda.device_count()
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = allowed.split(",") if allowed else [str(index) for index in range(count)]
    if count > 1:
        return {"CUDA_VISIBLE_DEVICES": names[worker % count]}
    if count or workers == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() // workers))}


def _check(run: PlannedRun, study: Study, start: PlannedRun) -> None:
    settings = run.settings(study.config)
    steps, every = settings.run.max_steps, settings.eval.eval_steps
    if study.split == "selection" and (every is None or (run is not start and 0 < steps < every)):
        raise ConfigError(
            f'{run.name} would never be evaluated on the selection split, which split = "selection" compares: set '
            "eval.eval_steps, at most run.max_steps."
        )
    begun = read_json(run.folder / "config.json")
    if begun is None:
        return
    remedy = f"Remove {run.folder}, or take another output_dir for the study."
    if changed := changed_settings(begun, settings.model_dump(mode="json")):
        raise ConfigError(f"{run.name} was begun with other settings: {changed}. {remedy}")
    made = start.folder / "result.json"
    if run is not start and (not made.exists() or made.stat().st_mtime > (run.folder / "config.json").stat().st_mtime):
        raise ConfigError(f"{run.name} was begun before the shared start was made. {remedy}")


def _folder_name(name: str) -> str:
    return re.sub(r"[^a-z0-9.=_-]+", "-", name.lower()).strip("-.")


def _quoted(path: Path) -> str:
    """As a TOML string."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
