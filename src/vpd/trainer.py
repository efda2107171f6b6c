"""Runs the EM loop: Variational Policy Distillation, Algorithm 1 (arXiv 2605.15113), from top to bottom.

One iteration samples N completions for each prompt of a batch, has them judged, builds the teacher's prompts from the
feedback, and hands the rollouts to the algorithm. On E-iterations the algorithm refines the teacher on outcomes, and on
all iterations it distils the teacher's token distribution into the student. Both are the same network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from vpd.algorithms.base import ExampleBatch, TokenNumbers, UpdateResult
from vpd.algorithms.example import Example, make_examples, with_teacher
from vpd.algorithms.extrapolation import extrapolate, is_due
from vpd.base_trainer import BaseTrainer
from vpd.batch import Batch
from vpd.config import VPDConfig
from vpd.environments import Environment, choose_environment
from vpd.evaluation import batch_statistics, reward_statistics
from vpd.feedback import FeedbackSource, build_views, successes
from vpd.monitoring.throughput import Throughput
from vpd.phases import (
    after_step,
    after_training,
    before_training,
    evaluate_last,
    finish,
    open_run,
    save_last,
    show_progress,
    tell_of_skipped,
    write_samples,
)
from vpd.rollout import Sampled
from vpd.runs.files import RunError
from vpd.runs.interrupt import InterruptGuard
from vpd.runs.result import TrainOutput
from vpd.seeds import mix
from vpd.setup import assemble, checked, make_policy, with_steps
from vpd.timing import Timer
from vpd.types import Rollout, TeacherView

_OF_SECOND_ATTEMPTS = 2
"""Tells the seed of the teacher's answers apart from that of the student's in the same step."""


class VPDTrainer(BaseTrainer):
    """Trains a causal language model from rewards and textual feedback.

    :class:`vpd.base_trainer.BaseTrainer` has the methods for evaluation, saving, the hub, callbacks and logs.

    Args:
        model: A hub id, folder, GGUF file or short name, or a loaded model; by default ``args.model.name``.
        args: All settings.
        environment: Holds the tasks and judges completions; by default the one that ``args.data`` describes.
        train_dataset: Rows with a ``prompt`` column, judged by ``reward_funcs``, in place of an environment.
        reward_funcs: Functions with TRL's signature; each returns floats or (reward, feedback) pairs.
        eval_dataset: Rows for the selection split, on which ``args.eval.eval_steps`` evaluates; by default they are cut
            off ``train_dataset``, as those of the final split are.
        reward_weights: The weight of each of ``reward_funcs``; 1 by default.
        processing_class: The tokenizer; by default the model's own.
        callbacks: The ``TrainerCallback`` objects of transformers.
        optimizers: An optimizer and a scheduler in place of those that ``args.optim`` describes.
        peft_config: A PEFT config, to train adapters only; by default the one that ``args.model.lora`` describes.
        feedback_sources: The sources of feedback, in order of preference; by default those that
            ``args.feedback.sources`` names.

    Raises:
        ConfigError: Settings or arguments cannot work together.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        args: VPDConfig | None = None,
        environment: Environment | None = None,
        train_dataset: Any = None,
        reward_funcs: Callable[..., Any] | str | Sequence[Callable[..., Any] | str] | None = None,
        eval_dataset: Any = None,
        reward_weights: Sequence[float] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: Any = None,
        feedback_sources: Sequence[FeedbackSource] | None = None,
    ) -> None:
        args = checked(args)
        set_seed(args.run.seed)
        policy, tokenizer = make_policy(args, model, processing_class, peft_config)
        environment = choose_environment(
            args.data, environment, train_dataset, reward_funcs, eval_dataset, reward_weights
        )
        args = with_steps(args, environment)
        parts = assemble(
            args,
            policy,
            tokenizer,
            environment,
            callbacks=callbacks or (),
            optimizers=optimizers,
            sources=feedback_sources,
        )
        super().__init__(args, environment, tokenizer, parts)

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Run everything: the warm start, the pre-flight measurement, the EM loop and the final evaluation.

        Args:
            resume_from_checkpoint: True to go on from the newest checkpoint in ``run.output_dir``, where there is one;
                or the path of a checkpoint of this run, whose later checkpoints and measurements are then removed.

        Raises:
            ConfigError: ``run.output_dir`` cannot be used, or the path is no checkpoint of this run.
            RunError: No checkpoint is sound, or the folder cannot be written.
        """
        start = time.perf_counter()
        with open_run(self, resume_from_checkpoint) as run:
            if run.finished is not None:
                return run.finished
            if not run.goes_on:
                before_training(self)
            self.callbacks.train_begin()
            with self.journal.progress, InterruptGuard() as guard:
                show_progress(self)
                while not self._is_finished(guard):
                    self._iterate()
                measured = not self.learner.largest(guard.signal_number or 0) and evaluate_last(self)
                save_last(self, has_changed=measured)
                # The signal may have reached one process alone.
                interrupted = int(self.learner.largest(guard.signal_number or 0)) or None
            self.callbacks.train_end()
            if interrupted is None:
                after_training(self)
            else:
                self.save_model()
            return finish(self, time.perf_counter() - start, interrupted)

    def _iterate(self) -> None:
        """Run one rollout batch (Algorithm 1, lines 3 to 17), and what is due after it."""
        step = self.run_state.step + 1
        set_seed(mix(self.args.run.seed, step, self.accelerator.process_index))
        throughput, timer = Throughput(self.learner), Timer()
        self.callbacks.step_begin()

        sampled = self.sample(step)
        batch = self.with_feedback(sampled)
        metrics, result = self.update(batch, step)
        metrics |= self._extrapolate(step, timer)
        self._sync(timer)
        metrics |= throughput.metrics(batch.token_count, timer.seconds | result.seconds | batch.seconds)
        self._record(step, batch, metrics, result.tokens)

        self.callbacks.step_end()
        after_step(self)

    def _is_finished(self, guard: InterruptGuard) -> bool:
        """Tell whether to stop, alike on every process, since a signal or the clock may reach one alone."""
        limits, state = self.args.run, self.run_state
        out_of_time = limits.max_seconds is not None and state.train_seconds >= limits.max_seconds
        asked = self.callbacks.control.should_training_stop or state.stopped_by is not None
        stop = guard.signal_number is not None or out_of_time or asked
        return state.step >= limits.max_steps or bool(self.learner.total(stop)[0])

    def sample(self, step: int) -> Sampled:
        """Sample this process's share of rollout batch ``step`` from the student, and have it judged.

        Raises:
            RunError: The judge failed on too much of the batch, and the run would learn from what little it graded.
        """
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        sampled = self.sampler.sample(
            self.curriculum.tasks_of_step(step)[process::processes],
            self.args.rollout.num_generations,
            seed=mix(self.args.run.seed, step, process),
            first_group=process,
            group_stride=processes,
        )
        ungraded, count = self.learner.total(len(sampled.judge_errors), len(sampled.rollouts))
        limit = self.args.rollout.max_ungraded_share
        if self.algorithm.needs_verdicts and ungraded > limit * count:
            reason = sampled.judge_errors[-1] if sampled.judge_errors else "told by another process"
            raise RunError(
                f"The judge failed on {ungraded / count:.0%} of the rollouts of step {step}, more than "
                f"rollout.max_ungraded_share = {limit:g} allows. The last reason: {reason}"
            )
        return sampled

    def with_feedback(self, sampled: Sampled) -> Batch:
        """Decide which rollouts succeeded, and build the teacher's prompts for them all."""
        rollouts = sampled.rollouts
        is_success = successes(rollouts, self.args.algorithm.threshold)
        permute = self.args.feedback.permute
        feedback = build_views(
            rollouts, is_success, self.prompts, seed=sampled.seed, sources=self.sources, permute=permute
        )
        views, tally = feedback.views, feedback.tally
        if self.args.algorithm.truncated == "mask":
            views = [None if r.truncated else view for r, view in zip(rollouts, views, strict=True)]
        seconds = sampled.seconds | {phase: value for phase, value in tally.seconds.items() if value}
        return Batch(rollouts, is_success, views, tally.counts, sampled.token_count + tally.token_count, seconds)

    def update(self, batch: Batch, step: int) -> tuple[dict[str, Any], UpdateResult]:
        """Let the algorithm learn from one batch: VPD refines the teacher (E-step) and distils it (M-step).

        Returns:
            The batch's metrics, and the algorithm's result with the numbers of each completion token.
        """
        examples = self._examples(batch.rollouts, batch.is_success, batch.views)
        total, largest = self.learner.total, self.learner.largest
        statistics = reward_statistics(batch.rollouts, total, self.learner.union)
        statistics |= batch_statistics(batch.rollouts, batch.is_success, batch.views, total, largest)
        # A source of one's own may count under a name on one process alone.
        if names := self.learner.union(batch.counts):
            statistics |= dict(zip(names, total(*(batch.counts.get(name, 0.0) for name in names)), strict=True))
        given = ExampleBatch(examples, step, self.args.rollout.prompts_per_step)
        given = replace(given, second_attempts=self._second_attempts(batch, examples, step))
        if self.args.eval.margin_tasks and self.algorithm.wants_fresh(self.learner, given):
            given = replace(given, fresh=self._fresh_examples(batch, step))
        self.sampler.engine.release()
        result = self.algorithm.update(self.learner, given)
        for weights in self.learner.copies.values():
            weights.follow(self.learner.module)
        statistics |= result.metrics | self.learner.skipped.metrics()
        return statistics | {"learning_rate": self.optimizer.param_groups[0]["lr"]}, result

    def _fresh_examples(self, batch: Batch, step: int) -> list[Example]:
        """Sample held-out rollouts, on which an E-step's effect is measured; their cost counts as the batch's."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        tasks = list(self.environment.tasks("selection"))[: self.args.eval.margin_tasks][process::processes]
        seed = mix(self.args.run.seed, -step, process)
        fresh = self.with_feedback(self.sampler.sample(tasks, self.args.rollout.num_generations, seed=seed))
        batch.add_cost(fresh.token_count, fresh.seconds)
        return with_teacher(self._examples(fresh.rollouts, fresh.is_success, fresh.views))

    def _second_attempts(self, batch: Batch, examples: list[Example], step: int) -> list[Example]:
        """Let the teacher answer once more where the algorithm asks for it, and have its answers judged."""
        chosen = self.algorithm.second_attempts(self.learner, examples)
        if not chosen:
            return []
        views = [view for index in chosen if (view := batch.views[index]) is not None]
        seed = mix(self.args.run.seed, step, self.accelerator.process_index, _OF_SECOND_ATTEMPTS)
        sampled = self.sampler.sample_again([batch.rollouts[index] for index in chosen], views, seed)
        batch.add_cost(sampled.token_count, sampled.seconds)
        together = [*batch.rollouts, *sampled.rollouts]
        is_success = successes(together, self.args.algorithm.threshold)[len(batch.rollouts) :]
        batch.second_attempts = list(zip(sampled.rollouts, views, is_success, strict=True))
        # Ungraded and cut ones have been tried as well, and count as such.
        made = make_examples(sampled.rollouts, is_success, views, graded_only=False)
        return [replace(example, rollout=len(batch.rollouts) + example.rollout) for example in made]

    def _examples(
        self, rollouts: Sequence[Rollout], is_success: Sequence[bool], views: Sequence[TeacherView | None]
    ) -> list[Example]:
        masks = self.args.algorithm.truncated == "mask"
        return make_examples(rollouts, is_success, views, masks, self.algorithm.needs_verdicts)

    def _extrapolate(self, step: int, timer: Timer) -> dict[str, Any]:
        """Extrapolate along the weights' path, at the steps at which that is due."""

        def score() -> float:
            self.sampler.engine.sync()
            found = self.evaluator.accuracy("train", self.args.optim.extrapolation_tasks)
            return found.accuracy if self.args.algorithm.success == "threshold" else found.reward

        if not (self.args.optim.extrapolation and is_due(step)):
            return {}
        with timer("extrapolation"):
            return extrapolate(self.learner, score)

    def _sync(self, timer: Timer) -> None:
        """Bring the rollout engine and the learning rate up to date for the next batch."""
        with timer("sync"):
            self.lr_scheduler.step()
            self.sampler.engine.sync()

    def _record(self, step: int, batch: Batch, metrics: dict[str, Any], tokens: Mapping[int, TokenNumbers]) -> None:
        """Count and log the batch, and go on to the curriculum's next stage where enough rollouts succeeded."""
        self.run_state.step = self.state.global_step = step
        self.run_state.train_seconds += metrics["seconds"]
        self.run_state.skipped_e_steps += metrics.get("e_step") == 0
        self.journal.log_step(step, metrics)
        self.callbacks.log(metrics)
        self.monitor.watch(metrics)
        write_samples(self, batch, tokens)
        tell_of_skipped(self)
        if self.curriculum.advance(step, rate := metrics["success_rate"]):
            self.monitor.begin_anew()
            stage, stages = self.curriculum.stage, len(self.curriculum.stages)
            self.journal.log(step, "stage", {"stage": stage, "success_rate": rate})
            self.journal.say(f"Stage {stage + 1} of {stages} begins: {rate:.0%} succeeded.")
