"""Our side of the comparison: the real trainer, one iteration at a time."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from accelerate.utils import set_seed

from benchmarks.step import memory, models
from benchmarks.step.specs import LEARNING_RATE, Side, SideInfo, StepRecord, Workload
from benchmarks.step.tasks import ImposedVerdicts, needed_tokens
from vpd.batch import Batch
from vpd.config import VPDConfig
from vpd.rollout import RolloutSampler, Sample
from vpd.timing import Timer
from vpd.trainer import VPDTrainer
from vpd.types import Rollout, Task

_ALGORITHM = {
    # These settings match TRL's: distillation_alpha = 1 is the reverse KL, and each sequence is divided by its length.
    "sdpo": {"type": "sdpo", "teacher": "live", "divergence": "reverse_kl", "loss_aggregation": "sequence_mean"},
    "vpd": {"type": "vpd", "teacher": "live", "divergence": "reverse_kl", "e_step_every": 5},
    "grpo": {"type": "grpo"},
}


class WholeCompletions(RolloutSampler):
    """A sampler whose completions all reach the length limit, and count as ended there rather than as truncated."""

    def _rollout(self, task: Task, group: int, prompt: list[int], sample: Sample) -> Rollout:
        rollout = super()._rollout(task, group, prompt, sample)
        return replace(rollout, turns=[replace(turn, truncated=False) for turn in rollout.turns])


def settings(side: Side, workload: Workload, folder: str) -> VPDConfig:
    """Make the run's settings; ``side.overrides`` come last."""
    values: dict[str, Any] = {f"algorithm.{key}": value for key, value in _ALGORITHM[side.algorithm].items()} | {
        "model.dtype": "bfloat16" if side.precision == "bfloat16" else "float32",
        "model.autocast": "bfloat16" if side.precision == "autocast" else "none",
        "model.gradient_checkpointing": side.gradient_checkpointing,
        "rollout.prompts_per_step": workload.prompts,
        "rollout.num_generations": workload.num_generations,
        "rollout.max_completion_length": workload.completion_tokens,
        "rollout.max_prompt_length": 4096,
        "rollout.dtype": "float32" if side.precision == "float32" else "bfloat16",
        "feedback.sources": ["environment"],
        "optim.learning_rate": LEARNING_RATE,
        "run.output_dir": folder,
    }
    # JSON serves as TOML here, because no value occurs that the two write differently.
    return VPDConfig.from_overrides([*(f"{key}={json.dumps(value)}" for key, value in values.items()), *side.overrides])


def run(side: Side, workload: Workload, conduct: Callable[[SideInfo | StepRecord], None]) -> None:
    """Make the trainer, then step whenever ``conduct`` returns; it takes a report and waits for the next turn."""
    tokenizer = models.tokenizer_of(side.model)
    environment = ImposedVerdicts(tokenizer, workload)
    idle = memory.resident_bytes()
    network = models.network(side.model, side.precision)
    with tempfile.TemporaryDirectory() as folder:
        trainer = VPDTrainer(
            model=network,
            args=settings(side, workload, folder),
            environment=environment,
            processing_class=tokenizer,
        )
        made = trainer.sampler
        trainer.sampler = WholeCompletions(
            made.engine, made.tokenizer, environment, made.prompts, made.settings, eos_token_ids=()
        )
        trainer.learner.module.share_prefixes &= side.share_prefixes
        conduct(memory.side_info(idle, trainer.learner.module))
        for step in itertools.count(1):
            conduct(_step(trainer, step, workload))


def _step(trainer: VPDTrainer, step: int, workload: Workload) -> StepRecord:
    """Do what ``VPDTrainer._iterate`` does, but write nothing to the run's folder."""
    memory.reset_peak()
    start = time.perf_counter()
    set_seed(step)
    timer, before = Timer(), trainer.learner.counts
    batch = trainer.with_feedback(trainer.sample(step))
    sampled_at = time.perf_counter()
    metrics, result = trainer.update(batch, step)
    for phase, phase_seconds in result.seconds.items():
        timer.seconds[phase] += phase_seconds
    with timer("sync"):
        trainer.lr_scheduler.step()
        trainer.sampler.engine.sync()
    seconds = time.perf_counter() - start

    phases = dict(timer.seconds | batch.seconds)
    phases["contexts"] = sampled_at - start - phases["rollout"] - phases["judge"]
    has_teacher = trainer.algorithm.reads_feedback
    needed, needed_jointly = _needed(batch, has_teacher)
    record = StepRecord(
        seconds=seconds,
        phases=phases,
        peak_bytes=memory.peak_bytes(),
        tokens_computed=(trainer.learner.counts - before).computed,
        tokens_needed=needed,
        tokens_needed_jointly=needed_jointly,
        tokens_sampled=batch.token_count,
        rollouts=len(result.tokens) if has_teacher else len(batch.rollouts),
        divergence=metrics.get("divergence"),
        e_step=metrics.get("e_step") == 1.0,
    )
    _check(record, batch, workload)
    return record


def _needed(batch: Batch, has_teacher: bool) -> tuple[int, int]:
    students = [turn.prompt_ids + turn.completion_ids for rollout in batch.rollouts for turn in rollout.turns]
    teachers = [
        view.first.prompt_ids + rollout.completion_ids
        for rollout, view in zip(batch.rollouts, batch.views, strict=True)
        if view is not None and has_teacher
    ]
    return needed_tokens(students, teachers)


def _check(record: StepRecord, batch: Batch, workload: Workload) -> None:
    """Check that the work is the work that was asked for."""
    lengths = {len(rollout.completion_ids) for rollout in batch.rollouts}
    if lengths != {workload.completion_tokens} or record.rollouts != workload.rollouts:
        raise RuntimeError(f"{record.rollouts} rollouts took part, with completions of {lengths} tokens.")
    if sum(batch.is_success) * 2 != workload.rollouts:
        raise RuntimeError(f"{sum(batch.is_success)} of {workload.rollouts} rollouts succeeded, not half of them.")
