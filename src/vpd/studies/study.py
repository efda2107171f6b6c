"""A study runs several settings (arms) by several seeds, all from one shared start.

    config = "quickstart.toml"          # of all arms, relative to this file
    output_dir = "runs/compare"         # relative to this file, too
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

from pydantic import Field, ValidationError, model_validator

from vpd.config import ConfigError, Section, VPDConfig, sentences_of
from vpd.config.overrides import anchored_overrides, anchored_path, quoted
from vpd.device import gpu_count, usable_cores
from vpd.runs.files import RunError
from vpd.runs.folder import RunFolder, changed_settings, read_json


class Arm(Section):
    name: str = Field(min_length=1)
    """The arm's name in the table and in the plots."""
    set: list[str] = Field(default_factory=list)
    """The arm's own settings, on top of the study's: ``section.key=value`` or ``section={...}``."""


class Study(Section):
    config: str
    """The TOML file of settings that all arms share, relative to the study's file."""
    output_dir: str
    """The folder of the runs, the table and the plots, relative to the study's file. Studies with the same
    ``output_dir`` share its start and the runs that they have in common."""
    report_dir: str | None = None
    """The folder of the table and the plots, in place of ``output_dir``: of several studies with the same
    ``output_dir`` each needs its own."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """The values of ``run.seed``; every arm has one run for each."""
    set: list[str] = Field(default_factory=list)
    """Settings for all arms and the start: ``section.key=value`` or ``section={...}``."""
    split: Literal["final", "selection"] = "final"
    """The split whose questions the table is about. ``selection`` is for tuning: the last evaluation on it counts
    (``eval.eval_steps``), and the final questions are not asked."""
    keep_models: bool = True
    """Keep the model, the best weights and the checkpoints of finished runs. Otherwise they are removed, and the runs'
    figures stay."""
    arms: list[Arm] = Field(min_length=1)
    """The settings to compare; all other arms are compared with the first one."""

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
        """Read a study from a TOML file.

        Raises:
            ConfigError: The file is missing or malformed, or settings in it are wrong.
        """
        try:
            study = cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"The study {path} cannot be read: {error}.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}.") from None
        except ValidationError as error:
            raise ConfigError("\n".join(sentences_of(error, str(path), cls))) from None
        study.config = anchored_path(study.config, path)
        study.output_dir = anchored_path(study.output_dir, path)
        study.report_dir = study.report_dir and anchored_path(study.report_dir, path)
        for part in (study, *study.arms):
            part.set = anchored_overrides(part.set, path)
        return study


START = "start"
"""The name of the folder of the run that all arms begin with."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        name: The arm and the seed, for people.
        folder: The run's folder.
        overrides: The run's settings, on top of the study's config.
    """

    name: str
    folder: Path
    overrides: list[str]

    def settings(self, config: str) -> VPDConfig:
        """Return all settings of the run."""
        return VPDConfig.load(config, self.overrides)

    def is_finished(self) -> bool:
        result = read_json(self.folder / "result.json")
        return result is not None and result.get("interrupted") is None

    def remove_if_unresumable(self) -> None:
        """Remove the folder of a run that ended before its first checkpoint; refuse a folder that holds no run."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        folder = RunFolder(self.folder, resume=True)
        if not folder.holds_a_run():
            raise ConfigError(f"{self.folder} is in the way: {self.name} would be written there, and it holds no run.")
        if folder.latest_checkpoint() is None:
            shutil.rmtree(self.folder)


def start_of(study: Study) -> PlannedRun:
    """Plan the run that makes the shared start and measures it."""
    folder = Path(study.output_dir) / START
    return PlannedRun(START, folder, [*_shared_settings(study), "run.max_steps=0", f"run.output_dir={quoted(folder)}"])


def runs_of(study: Study, arm: Arm) -> list[PlannedRun]:
    """Plan the runs of an arm, one for each seed.

    An arm's own settings come last: an arm that names another model leaves the shared start, and an arm that sets a
    warm start makes it on top of the shared one.
    """
    common = [
        *_shared_settings(study),
        f"model.name={quoted(start_of(study).folder / 'model')}",
        "warm_start.demonstrations=0",
    ]
    runs = []
    for seed in study.seeds:
        folder = Path(study.output_dir) / _folder_name(arm.name) / f"seed-{seed}"
        of_seed = [f"run.seed={seed}", f"warm_start.seed={seed}", "eval.eval_on_start=false"]
        place = f"run.output_dir={quoted(folder)}"
        runs.append(PlannedRun(f"{arm.name}, seed {seed}", folder, [*common, *of_seed, *arm.set, place]))
    return runs


def _shared_settings(study: Study) -> list[str]:
    return [*study.set, *(["eval.final_tasks=0"] if study.split == "selection" else [])]


def run_study(study: Study, workers: int = 1, say: Callable[[str], None] = print) -> None:
    """Run whatever is not finished yet; each run's output goes to a file beside its folder, such as ``seed-0.log``.

    SIGINT and SIGTERM are passed on to the current runs, which save a checkpoint and end.

    Args:
        study: The study.
        workers: How many runs go at the same time. Where there are several GPUs, each run takes the next one; where
            there is none, each takes its share of the CPU's cores.
        say: A function that receives a line whenever a run begins or ends.

    Raises:
        ConfigError: Settings of an arm are wrong, or a run was begun with other settings. Nothing has been run then.
        RunError: A run failed, and no further one has begun. Or another process is running the study.
        KeyboardInterrupt: A signal came, and the current runs have ended.
    """
    start = start_of(study)
    runs = [run for arm in study.arms for run in runs_of(study, arm)]
    for run in (start, *runs):
        _check(run, study, start)
    with _locked(Path(study.output_dir)), _Pool(study.config, workers, say) as pool:
        pool.run_all([start])
        if not study.keep_models:
            # Some runs may have finished before this was set, or before their study was killed.
            for run in runs:
                if run.is_finished():
                    _remove_weights(run)
        pool.run_all(runs, then=None if study.keep_models else _remove_weights)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder, so that two processes cannot write the same runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"The study in {folder} is being run already, by another process.") from None
        yield


class _Pool:
    """A pool that runs several processes at a time. After a failure or a signal no further run begins."""

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
                self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run_all(self, runs: Sequence[PlannedRun], then: Callable[[PlannedRun], None] | None = None) -> None:
        """Run whatever is not finished yet, and call ``then`` with each run that has finished now."""
        unfinished = [run for run in runs if not run.is_finished()]
        # A single run has the whole machine.
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

    def _forward(self, number: int, frame: FrameType | None) -> None:
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
        run.remove_if_unresumable()
        log = run.folder.with_name(f"{run.folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        changes = [part for override in run.overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "vpd.cli", "train", self._config, "--resume", *changes]
        environment = environments.get()
        self._say(f"{run.name} begins; its log is {log}.")
        with open(log, "ab") as file:
            # The run has a process group of its own, so that a terminal's Ctrl-C reaches it once, through this
            # process, and not twice.
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
    """Return the environment variables of a worker's runs, by which runs at the same time share the machine.

    Where there are several GPUs, each worker gets its own. Without a GPU a worker gets as many threads as its share of
    the cores: with more, the threads of one run would wait for a core that another run holds, and every matrix product
    would wait for these threads.
    """
    count = gpu_count()
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = allowed.split(",") if allowed else [str(index) for index in range(count)]
    if count > 1:
        return {"CUDA_VISIBLE_DEVICES": names[worker % count]}
    if count or workers == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() // workers))}


def _check(run: PlannedRun, study: Study, start: PlannedRun) -> None:
    settings = run.settings(study.config)
    if study.split == "selection" and not settings.eval.eval_steps:
        raise ConfigError(
            f'{run.name} would never be evaluated on the selection split, which split = "selection" compares: set '
            "eval.eval_steps."
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
