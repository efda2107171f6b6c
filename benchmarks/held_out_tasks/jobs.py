"""One job runs one method on one task with one seed, from the task's start, and writes one JSON file.

    DIR/TASK/start/              the run that makes the warm start, and its model
    DIR/TASK/start.json          the start's accuracy
    DIR/TASK/METHOD-0.json       what the method with seed 0 made of it
    DIR/TASK/METHOD-0/           that run's folder, without its weights
    DIR/TASK/METHOD-0.log        what it said

All methods and seeds of a task begin with the same weights.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.held_out_tasks.suite import METHODS, SETTINGS, SUITE, Sections
from benchmarks.own_tasks.run_one import GENERATIONS, PROMPTS, Budget
from vpd import VPDConfig, VPDTrainer
from vpd.config import ConfigError
from vpd.environments import Split
from vpd.evaluation import wilson_interval
from vpd.runs.files import atomic_write_text
from vpd.runs.folder import RunFolder, read_json, read_metrics

START = "start"
"""The method of the job that makes a task's start."""


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        task: A name from the suite.
        method: A name from the methods, or ``start``.
        seed: The run's seed; 0 for the start.
        rollouts: After how many rollouts training ends, the teacher's second attempts included; 0 for the start.
        eval_steps: How many batches lie between evaluations on the selection split; 0 for the start.
        selection: How many questions these ask.
        final: How many questions of the final split are asked at most.
        model: The network that the start begins with.
        algorithm: The method's settings by section.
    """

    task: str
    method: str
    seed: int
    rollouts: int
    eval_steps: int
    selection: int
    final: int
    model: str
    algorithm: Sections

    @property
    def name(self) -> str:
        return START if self.method == START else f"{self.method}-{self.seed}"

    def result(self, out: Path) -> Path:
        """The JSON file that the finished job leaves."""
        return out / self.task / f"{self.name}.json"

    def folder(self, out: Path) -> Path:
        """The folder of its run."""
        return out / self.task / self.name

    def is_finished(self, out: Path) -> bool:
        """Whether the job is done already.

        Raises:
            ConfigError: It was done with other settings.
        """
        found = read_json(self.result(out))
        if found is None:
            return False
        now = json.loads(json.dumps(asdict(self)))
        if changed := [name for name in now if found["job"].get(name) != now[name]]:
            raise ConfigError(
                f"{self.result(out)} was made with other settings ({', '.join(changed)}): remove {out / self.task}, or "
                "take another --out."
            )
        return True


def settings_of(job: Job, out: Path) -> VPDConfig:
    """Return all settings of a job's run."""
    entry, start = SUITE[job.task], out / job.task / START / "model"
    begins = job.method == START
    values: dict[str, dict[str, Any]] = {section: dict(of_all) for section, of_all in SETTINGS.items()}
    of_job: Sections = {
        "model": {"name": job.model if begins or not entry.demonstrations else str(start)},
        "rollout": {"max_completion_length": entry.completion_tokens},
        "run": {"output_dir": str(job.folder(out)), "max_steps": job.rollouts, "seed": job.seed},
    }
    of_start: Sections = {
        "warm_start": {"demonstrations": entry.demonstrations, "epochs": entry.epochs, "cache": False},
        "eval": {"preflight_tasks": 0},
    }
    # A threshold other than 1 is the task's, whatever the method.
    threshold = {"algorithm": {"success_threshold": entry.success_threshold}}
    of_method: Sections = of_start if begins else {"eval": {"eval_steps": job.eval_steps}}
    for sections in (of_job, of_method, job.algorithm, threshold):
        for section, changes in sections.items():
            values.setdefault(section, {}).update(changes)
    return VPDConfig.parse(values)


def run(job: Job, out: Path) -> dict[str, Any]:
    """Run a job whose start is there, write its file, and return what it holds.

    What a run that was interrupted has left is removed first.
    """
    args, folder, began = settings_of(job, out), job.folder(out), time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    environment = SUITE[job.task].environment(selection=job.selection)
    trainer = VPDTrainer(args=args, environment=environment, callbacks=[Budget(job.rollouts)])
    output = trainer.train()
    entries = read_metrics(folder)
    trained = [entry for entry in entries if entry["event"] == "train"]
    values: dict[str, Any] = {
        "job": asdict(job),
        "settings": args.model_dump(mode="json"),
        "steps": output.global_step,
        "rollouts": sum(PROMPTS * GENERATIONS + int(entry.get("second_attempts") or 0) for entry in trained),
        "best_step": trainer.run_state.best_step,
        "stopped_by": output.metrics["stopped_by"],
        "final": measure(trainer, "final", job.final),
        "selection": _curve(trainer, job, entries),
        "success_rate": [[entry["step"], entry["success_rate"]] for entry in trained],
        "warnings": [{key: e[key] for key in ("step", "name", "text")} for e in entries if e["event"] == "warning"],
        "train_seconds": output.metrics["train_seconds"],
        "seconds": time.perf_counter() - began,
    }
    if job.method != START or not args.warm_start.demonstrations:
        RunFolder(folder, resume=True).remove_weights()
    atomic_write_text(job.result(out), json.dumps(values, indent=1) + "\n")
    return values


def measure(trainer: VPDTrainer, split: Split, limit: int) -> dict[str, Any]:
    """Ask the questions of a split once each, sampled as the run's evaluations are: greedily by default.

    Returns:
        ``accuracy`` with its 95% interval ``low`` and ``high``, ``n``, ``reward`` (the mean), and ``outcomes`` and
        ``rewards`` by question.
    """
    trainer.sampler.engine.sync()
    tasks = list(trainer.environment.tasks(split))[:limit]
    cut = {name: getattr(trainer.args.eval, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    rollouts = trainer.sampler.sample(tasks, 1, seed=0, cut=cut).rollouts
    rewards = {rollout.task.id: rollout.verdict.reward for rollout in rollouts if rollout.verdict is not None}
    threshold = trainer.args.algorithm.success_threshold
    outcomes = {task: float(reward >= threshold) for task, reward in rewards.items()}
    low, high = wilson_interval(sum(outcomes.values()), len(outcomes))
    return {
        "accuracy": statistics.fmean(outcomes.values()),
        "low": low,
        "high": high,
        "n": len(outcomes),
        "reward": statistics.fmean(rewards.values()),
        "outcomes": outcomes,
        "rewards": rewards,
    }


def _curve(trainer: VPDTrainer, job: Job, entries: list[dict[str, Any]]) -> list[list[float]]:
    """Return pairs of step and accuracy on the selection split; the start has one."""
    if job.method == START:
        return [[0, measure(trainer, "selection", job.selection)["accuracy"]]]
    found = [entry for entry in entries if entry["event"] == "eval" and entry["split"] == "selection"]
    return [[entry["step"], entry["accuracy"]] for entry in found]


def start_of(job: Job) -> Job:
    """Return the job that makes the start of a method's job."""
    return Job(job.task, START, 0, 0, 0, job.selection, job.final, job.model, {})


def check(jobs: list[Job], out: Path) -> None:
    """Refuse names that there are not, and settings that cannot work, before anything runs."""
    for job in jobs:
        if job.task not in SUITE:
            raise ConfigError(f"There is no task {job.task!r}; there are {', '.join(SUITE)}.")
        settings_of(job, out)


def method_settings(name: str) -> Sections:
    """Return a method's settings by section.

    Raises:
        ConfigError: There is no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"There is no method {name!r}; there are {', '.join(METHODS)}.")
    return METHODS[name]
