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

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from pydantic import Field, ValidationError, model_validator

from vpd.config import ConfigError, Section, VPDConfig, sentences_of
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
    """Where the runs, the table and the plots go."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """``run.seed`` of the runs; every arm has a run of each."""
    set: list[str] = Field(default_factory=list)
    """``section.key=value`` or ``section={...}``, for all arms and the start."""
    arms: list[Arm] = Field(min_length=1)
    """The first is the one that the others are compared with."""

    @model_validator(mode="after")
    def _distinct(self) -> Study:
        folders = [_folder_name(arm.name) for arm in self.arms]
        for index, name in enumerate(folders):
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


def start_of(study: Study) -> PlannedRun:
    """The run that makes the shared start, and measures it."""
    folder = Path(study.output_dir) / START
    return PlannedRun(START, folder, [*study.set, "run.max_steps=0", f"run.output_dir={_quoted(folder)}"])


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
        runs.append(PlannedRun(f"{arm.name}, seed {seed}", folder, [*study.set, *begins, *own, *arm.set, place]))
    return runs


def run_study(study: Study, workers: int = 1, say: Callable[[str], None] = print) -> None:
    """Run what is not finished yet; the runs' own lines go to ``log.txt`` in their folders' parent.

    Args:
        study: what to run.
        workers: runs at the same time; where there are several GPUs, each takes the next one.
        say: is told of each run that begins and ends.

    Raises:
        ConfigError: settings of an arm are wrong, or a finished run had others. Nothing has been run then.
        RunError: a run failed; no further one is begun.
        KeyboardInterrupt: after the runs under way have saved a checkpoint and ended.
    """
    start = start_of(study)
    runs = [run for arm in study.arms for run in runs_of(study, arm)]
    for run in (start, *runs):
        _check(run, study.config)
    _run_all(study, [start], 1, say)
    _run_all(study, runs, workers, say)


def _run_all(study: Study, runs: list[PlannedRun], workers: int, say: Callable[[str], None]) -> None:
    devices: SimpleQueue[str] = SimpleQueue()
    for index in range(workers):
        devices.put(str(index % max(torch.cuda.device_count(), 1)))
    todo = [run for run in runs if not run.is_finished()]
    with ThreadPoolExecutor(workers) as pool:
        futures: list[Future[None]] = []
        try:
            for run in todo:
                futures.append(pool.submit(_run, study, run, devices, say))
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _run(study: Study, run: PlannedRun, devices: SimpleQueue[str], say: Callable[[str], None]) -> None:
    if run.folder.exists() and RunFolder(run.folder, resume=True).latest_checkpoint() is None:
        # Cut off before its first checkpoint: there is nothing to go on from.
        shutil.rmtree(run.folder)
    log = run.folder.with_name(f"{run.folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    changes = [part for override in run.overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "vpd.cli", "train", study.config, "--resume", *changes]
    environment = dict(os.environ)
    device = devices.get()
    if torch.cuda.device_count() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = device
    say(f"{run.name} begins; its log is {log}.")
    try:
        with open(log, "a", encoding="utf-8") as file:
            code = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment).wait()
    finally:
        devices.put(device)
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunError(f"{run.name} ended with exit code {code}: {lines[-1] if lines else ''} All of it is in {log}.")
    say(f"{run.name} is done.")


def _check(run: PlannedRun, config: str) -> None:
    settings = run.settings(config)
    if run.is_finished():
        before = read_json(run.folder / "config.json") or {}
        if changed := changed_settings(before, settings.model_dump(mode="json")):
            raise ConfigError(
                f"{run.name} is finished with other settings: {changed}. Remove {run.folder}, or take another "
                "output_dir for the study."
            )


def _folder_name(name: str) -> str:
    return re.sub(r"[^a-z0-9.=_-]+", "-", name.lower()).strip("-.")


def _quoted(path: Path) -> str:
    """As a TOML string."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
