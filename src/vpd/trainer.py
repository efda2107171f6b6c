"""The EM loop: Variational Policy Distillation, Algorithm 1 (arXiv 2605.15113), from top to bottom.

One iteration samples a batch of prompts with N completions each, has them judged, builds the teacher's prompts from
the feedback, and hands the rollouts to the algorithm: on E-iterations the teacher is refined on outcomes, then its
token distribution is distilled into the student. Both are the same network.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from vpd.algorithms.base import ExampleBatch, TokenNumbers, UpdateResult
from vpd.algorithms.example import Example, make_examples, with_teacher
from vpd.algorithms.extrapolation import extrapolate, is_due
from vpd.algorithms.warm_start import demonstration_sequences, warm_start
from vpd.config import ConfigError, VPDConfig
from vpd.environments import SPLITS, Environment, choose_environment
from vpd.evaluation import Evaluator
from vpd.evaluation.statistics import batch_statistics
from vpd.feedback import (
    Critic,
    CritiqueSource,
    EndpointCritic,
    FeedbackSource,
    FeedbackTexts,
    PromptBuilder,
    SelfCritic,
    build_views,
    make_sources,
)
from vpd.machine import peak_memory_bytes
from vpd.monitoring.callbacks import Callbacks, training_arguments
from vpd.monitoring.journal import Journal
from vpd.monitoring.measurements import Measurements
from vpd.monitoring.monitor import Monitor
from vpd.policy.copies import PREVIOUS, make_copies
from vpd.policy.cpu.allocator import keep_freed_memory
from vpd.policy.learner import Learner, TokenCounts
from vpd.policy.load import end_of_turn, eos_token_ids, save_policy
from vpd.policy.optimizer import make_optimizer, make_scheduler
from vpd.policy.prepare import check_layers, make_accelerator, prepare_policy
from vpd.report import write_report
from vpd.rollout import RolloutSampler, Sampled, make_engine
from vpd.runs.best_weights import BestWeights
from vpd.runs.files import RunError
from vpd.runs.folder import RunFolder
from vpd.runs.interrupt import InterruptGuard
from vpd.runs.samples import RolloutRecord
from vpd.runs.state import TrainingState
from vpd.seeds import mix
from vpd.timing import Timer
from vpd.types import Rollout, Task, TeacherView


@dataclass
class Batch:
    """The rollouts of one iteration on this process, with the teacher's prompts and what it took to make them.

    Attributes:
        rollouts: The judged rollouts.
        is_success: Whether each rollout has succeeded.
        views: The teacher's prompt of each rollout, None where it has no feedback.
        counts: What the feedback sources have counted, by metric.
        token_count: How many tokens were sampled.
        seconds: Wall-clock seconds by phase.
    """

    rollouts: list[Rollout]
    is_success: list[bool]
    views: list[TeacherView | None]
    counts: Mapping[str, float]
    token_count: int
    seconds: dict[str, float]


class VPDTrainer:
    """Trains a causal language model from rewards and textual feedback.

    Args:
        model: a hub id, folder, GGUF file or short name, or a loaded model; by default ``args.model.name``.
        args: all settings.
        environment: tasks and judge; by default what ``args.data`` describes.
        train_dataset: rows with a ``prompt`` column, judged by ``reward_funcs``, in place of an environment.
        reward_funcs: functions with TRL's signature; each returns floats or (reward, feedback) pairs.
        reward_weights: one for each of ``reward_funcs``; 1 by default.
        eval_dataset: rows for the final split; by default cut off ``train_dataset``.
        processing_class: the tokenizer; by default the model's own.
        callbacks: transformers' ``TrainerCallback`` objects.
        optimizers: an optimizer and a scheduler in place of those that ``args.optim`` describes.
        peft_config: a PEFT config, to train adapters only; by default what ``args.model.lora`` describes.
        feedback_sources: in order of preference; by default those that ``args.feedback.sources`` names.

    Raises:
        ConfigError: settings or arguments that cannot work together.
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
        self.args = args or VPDConfig()
        set_seed(self.args.run.seed)
        self.algorithm = self.args.make_algorithm()
        adapter = self.algorithm.teacher_adapter()
        policy, self.tokenizer = prepare_policy(model, processing_class, self.args.model, peft_config, adapter)
        self.environment = choose_environment(
            self.args.data, environment, train_dataset, reward_funcs, eval_dataset, reward_weights
        )
        training_args = training_arguments(self.args)
        self.accelerator = make_accelerator(self.args, adapter is not None)
        keep_freed_memory(self.accelerator.device)
        self.journal = Journal(self.accelerator)

        check_layers(policy, self.algorithm.matched_layers())
        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = optimizers[0] or make_optimizer(self.args.optim, trainable)
        self.scheduler = optimizers[1] or make_scheduler(self.args.optim, optimizer, self.args.run.max_steps)
        rates = {**self.algorithm.weight_copies(), **({PREVIOUS: 0.0} if self.args.optim.extrapolation else {})}
        copies = make_copies(policy, rates)
        prepared, prepared_optimizer = self.accelerator.prepare(policy, optimizer)
        self.learner = Learner(
            prepared,
            prepared_optimizer,
            self.accelerator,
            self.args.optim,
            self.args.rollout.temperature,
            copies=copies,
        )
        self.algorithm.prepare(self.learner, self.tokenizer, self.args.model)
        self.model = self.learner.module.model
        self.prompts = PromptBuilder(
            self.tokenizer,
            self.args.feedback,
            self.args.rollout.max_prompt_length,
            self.args.model.chat_template_kwargs,
        )
        eos = eos_token_ids(self.model, self.tokenizer)  # pyright: ignore[reportArgumentType]
        engine = make_engine(self.model, self.tokenizer, self.args.rollout)
        self.sampler = RolloutSampler(
            engine,
            self.tokenizer,
            self.environment,
            self.prompts,
            self.args.rollout,
            eos,
        )
        self.sources = feedback_sources or make_sources(self.args.feedback, self._make_critic())
        self.evaluator = Evaluator(self.sampler, self.environment, self.args, self.accelerator, self.sources)
        self.stages = [list(stage) for stage in self.environment.stages()]
        self._check_prompts()
        self.state = TrainingState()
        sources = [source.name for source in self.sources] if self.algorithm.needs_feedback else None
        self.monitor = Monitor(self.journal, self.state, sources, self.args.run.stop_on)
        self.measurements = Measurements(self.evaluator, self.journal, self.state, self.monitor, self.args.eval)
        self.best = BestWeights(self.args.run.output_dir)
        for weights in copies.values():
            weights.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.state, self.scheduler, self.algorithm, *copies.values())
        self.callbacks = Callbacks(
            callbacks or [],
            training_args,
            self.model,
            self.tokenizer,
            prepared_optimizer,
            self.scheduler,
            self.accelerator.is_main_process,
        )

    def _make_critic(self) -> Critic | None:
        settings = self.args.feedback
        if "critique" not in settings.sources or not self.algorithm.has_teacher:
            return None
        if settings.critique.endpoint is not None:
            return EndpointCritic(settings.critique)
        return SelfCritic(lambda chats, seed: self.sampler.answer(chats, settings.critique, seed))

    def train(self, resume_from_checkpoint: bool = False) -> dict[str, Any]:
        """Run everything: warm start, pre-flight, the EM loop, the final evaluation.

        Args:
            resume_from_checkpoint: go on from the newest checkpoint in ``run.output_dir``, where there is one.

        Returns:
            What is written to ``result.json``: the table's rows, and ``interrupted``, the signal that ended the run
            early, or None.
        """
        start = time.perf_counter()
        resumed = self._open_folder(resume_from_checkpoint)
        # What ended the run before is judged anew, by the settings as they are now.
        self.state.stopped_by = None
        if not resumed:
            self._before_training()
        self.callbacks.train_begin()
        with self.journal.progress, InterruptGuard() as guard:
            if self.accelerator.is_main_process:
                seconds_left = (self.args.run.max_seconds or math.inf) - self.state.train_seconds
                self.journal.progress.start(self.args.run.max_steps, self.state.step, seconds_left)
            while not self._is_finished(guard):
                self._iterate()
            # The signal may have reached one process alone; all must save together.
            interrupted = int(self.learner.largest(guard.signal_number or 0)) or None
            if interrupted is not None:
                self._save_checkpoint()
        self.callbacks.train_end()
        if interrupted is None:
            self._after_training()
        result = {
            "rows": self.state.rows,
            "environment": self.args.data.environment if self.args.data else type(self.environment).__name__,
            "model": self.model.name_or_path or self.args.model.name,
            "algorithm": self.args.algorithm.type,
            "steps": self.state.step,
            "train_seconds": self.state.train_seconds,
            "skipped_e_steps": self.state.skipped_e_steps,
            "seconds_total": time.perf_counter() - start,
            "stopped_by": self.state.stopped_by,
            "interrupted": interrupted,
        }
        if self.journal.folder is not None:
            self.journal.folder.write_result(result)
            result["report"] = str(write_report(self.journal.folder.path))
        return result

    def _iterate(self) -> None:
        """One rollout batch: sample, judge, give feedback, update (Algorithm 1, lines 3 to 17)."""
        start = time.perf_counter()
        step = self.state.step + 1
        set_seed(mix(self.args.run.seed, step, self.accelerator.process_index))
        timer, computed_before = Timer(), self.learner.counts
        self.callbacks.step_begin()

        batch = self.sample(step)
        metrics, result = self.update(batch, step)
        for phase, phase_seconds in result.seconds.items():
            timer.seconds[phase] += phase_seconds
        if self.args.optim.extrapolation and is_due(step):
            with timer("extrapolation"):
                metrics |= extrapolate(self.learner, self._score_for_extrapolation)
        with timer("sync"):
            self.scheduler.step()
            self.sampler.engine.sync()

        seconds = time.perf_counter() - start
        self.state.step = step
        self.state.train_seconds += seconds
        self.state.skipped_e_steps += metrics.get("e_step") == 0
        metrics |= self._speed(timer, batch, seconds, self.learner.counts - computed_before)
        self._log_step(step, metrics, batch, result.tokens)
        self._advance_stage(metrics["success_rate"])
        self.callbacks.step_end(step)
        control = self.callbacks.control
        # A callback may have asked on one process alone, and what follows needs all of them.
        evaluates, saves = self.learner.total(control.should_evaluate, control.should_save)
        if evaluates:
            evaluation = self.measurements.selection()
            self.callbacks.evaluate({"split": "selection", **evaluation.summary()})
            self._note_accuracy(evaluation.accuracy)
        if saves:
            self._save_checkpoint()

    def _score_for_extrapolation(self) -> float:
        self.sampler.engine.sync()
        return self.evaluator.accuracy("train", self.args.optim.extrapolation_tasks).accuracy

    def sample(self, step: int) -> Batch:
        """Sample and judge this process's share of rollout batch ``step``, and build the teacher's prompts."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        tasks = self.tasks_of_step(step)[process::processes]
        sampled = self.sampler.sample(
            tasks,
            self.args.rollout.num_generations,
            seed=mix(self.args.run.seed, step, process),
            first_group=process,
            group_stride=processes,
        )
        self._check_graded(sampled, step)
        return self.with_feedback(sampled)

    def _check_graded(self, sampled: Sampled, step: int) -> None:
        """Stop a run whose judge is broken, which would go on to learn from what little it grades."""
        ungraded, count = self.learner.total(len(sampled.judge_errors), len(sampled.rollouts))
        limit = self.args.rollout.max_ungraded_share
        if self.algorithm.needs_verdicts and ungraded > limit * count:
            reason = sampled.judge_errors[-1] if sampled.judge_errors else "told by another process"
            raise RunError(
                f"The judge failed on {ungraded / count:.0%} of the rollouts of step {step}, more than "
                f"rollout.max_ungraded_share = {limit:g} allows. The last reason: {reason}"
            )

    def with_feedback(self, sampled: Sampled) -> Batch:
        """Decide successes and build the teacher's prompts of judged rollouts."""
        rollouts, threshold = sampled.rollouts, self.args.algorithm.success_threshold
        is_success = [rollout.verdict is not None and rollout.verdict.reward >= threshold for rollout in rollouts]
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
        """The algorithm's updates on one batch: the batch's metrics, and what the algorithm did."""
        examples = self._examples(batch)
        statistics = batch_statistics(
            batch.rollouts, batch.is_success, batch.views, self.learner.total, self.learner.largest
        )
        self.sampler.engine.release()
        if batch.counts:
            statistics |= dict(zip(batch.counts, self.learner.total(*batch.counts.values()), strict=True))
        fresh = self._sampler_of_fresh_examples(batch, step) if self.args.eval.margin_tasks else None
        prompts = self.args.rollout.prompts_per_step
        result = self.algorithm.update(self.learner, ExampleBatch(examples, step, prompts, fresh))
        for weights in self.learner.copies.values():
            weights.follow(self.learner.module)
        learning_rate = self.learner.optimizer.param_groups[0]["lr"]
        return statistics | result.metrics | {"learning_rate": learning_rate}, result

    def tasks_of_step(self, step: int) -> list[Task]:
        """The prompts of rollout batch ``step``: epochs over the stage's tasks, each shuffled by seed and epoch."""
        stage = self.stages[self.state.stage]
        first = self.state.stage_start
        count, size = len(stage), self.args.rollout.prompts_per_step
        orders: dict[int, list[int]] = {}
        tasks = []
        for position in range((step - 1 - first) * size, (step - first) * size):
            epoch, place = divmod(position, count)
            if epoch not in orders:
                orders[epoch] = list(range(count))
                random.Random(f"{self.args.run.seed}-{epoch}").shuffle(orders[epoch])
            tasks.append(stage[orders[epoch][place]])
        return tasks

    def _advance_stage(self, success_rate: float | None) -> None:
        """Go on to the curriculum's next stage where enough of the batch, over all processes, has succeeded."""
        is_last = self.state.stage + 1 == len(self.stages)
        if is_last or success_rate is None or success_rate < self.args.rollout.next_stage_at:
            return
        self.state.stage += 1
        self.state.stage_start = self.state.step
        self.journal.log(self.state.step, "stage", {"stage": self.state.stage, "success_rate": success_rate})
        self.journal.say(f"Stage {self.state.stage + 1} of {len(self.stages)} begins: {success_rate:.0%} succeeded.")

    def _sampler_of_fresh_examples(self, batch: Batch, step: int) -> Callable[[], list[Example]]:
        """Samples held-out rollouts; the time and the tokens that they take count as the batch's."""

        def sample_fresh() -> list[Example]:
            process, processes = self.accelerator.process_index, self.accelerator.num_processes
            tasks = list(self.environment.tasks("selection"))[: self.args.eval.margin_tasks][process::processes]
            seed = mix(self.args.run.seed, -step, process)
            fresh = self.with_feedback(self.sampler.sample(tasks, self.args.rollout.num_generations, seed=seed))
            batch.token_count += fresh.token_count
            batch.seconds = dict(Counter(batch.seconds) + Counter(fresh.seconds))
            self.sampler.engine.release()
            return with_teacher(self._examples(fresh))

        return sample_fresh

    def _examples(self, batch: Batch) -> list[Example]:
        masks = self.args.algorithm.truncated == "mask"
        graded = self.algorithm.needs_verdicts
        return make_examples(batch.rollouts, batch.is_success, batch.views, masks, graded)

    def _is_finished(self, guard: InterruptGuard) -> bool:
        """Whether to stop; every process answers alike, since a signal or the clock may reach one alone."""
        out_of_time = self.args.run.max_seconds is not None and self.state.train_seconds >= self.args.run.max_seconds
        asked = self.callbacks.control.should_training_stop or self.state.stopped_by is not None
        stop = guard.signal_number is not None or out_of_time or asked
        return self.state.step >= self.args.run.max_steps or bool(self.learner.total(stop)[0])

    def _before_training(self) -> None:
        settings = self.args.warm_start
        self.sampler.engine.sync()
        if self.args.eval.eval_on_start:
            self.measurements.row("base model")
        if settings.demonstrations:
            threshold = self.args.algorithm.success_threshold
            eos = end_of_turn(self.tokenizer)
            sources = [s for s in self.sources if settings.feedback and not isinstance(s, CritiqueSource)]
            sequences = demonstration_sequences(
                self.environment, self.prompts, eos, settings.demonstrations, threshold, settings.seed, sources
            )
            self.sampler.engine.release()
            result = warm_start(self.learner, sequences, settings, self.tokenizer)
            self.sampler.engine.sync()
            how = f"{result.steps} steps, loss {result.loss:.3f}" if result.steps else f"found in {result.folder}"
            self.journal.say(f"Warm start on {result.sequences} sequences: {how}, {result.seconds:.0f} s.")
            self.journal.log(0, "warm_start", {"steps": result.steps, "loss": result.loss, "seconds": result.seconds})
            if self.args.eval.eval_on_start or not self.args.run.max_steps:
                self.measurements.row("after warm start")
        for weights in self.learner.copies.values():
            weights.assign(self.learner.module)
        for name, text in self.algorithm.warnings().items():
            self.journal.warn(name, text)
        if self.args.eval.preflight_tasks and self.algorithm.has_teacher:
            self.measurements.preflight()

    def _after_training(self) -> None:
        best = self.state.best_step
        if self.args.eval.load_best_model_at_end and best not in (-1, self.state.step):
            self.best.load(self.model, best)
            self.sampler.engine.sync()
            self.journal.say(
                f"Back to the weights of step {best}, {self.state.best_accuracy:.1%} on the selection split."
            )
        if not self.args.run.max_steps and self.args.eval.eval_steps:
            self.measurements.selection()
        if self.state.step or not self.state.rows:
            self.measurements.row(f"after {self.args.algorithm.type.upper()}", self.state.train_seconds)
        if self.state.step and self.args.eval.preflight_tasks and self.algorithm.has_teacher:
            self.measurements.gap("After training")
        if self.journal.folder is not None:
            try:
                save_policy(self.model, self.tokenizer, self.journal.folder.path / "model")  # pyright: ignore
            except OSError as error:
                raise RunError(str(error)) from error
        self.accelerator.wait_for_everyone()
        if self.args.run.report_to:
            self.accelerator.end_training()

    def _check_prompts(self) -> None:
        """Refuse a task whose prompt is too long now, and not when it comes up hours into the run."""
        tasks = [task for split in SPLITS for task in self.environment.tasks(split)]
        if not tasks:
            raise ConfigError("The environment has no tasks.")
        longest = max(tasks, key=lambda task: len(self.prompts.student(task.prompt)))
        self.prompts.teacher(longest.prompt, FeedbackTexts("sibling", False, solution="", feedback=""))

    def _note_accuracy(self, accuracy: float) -> None:
        """Keep the best weights so far, and stop where nothing better has come for long enough."""
        state, settings = self.state, self.args.eval
        if not accuracy > state.best_accuracy:  # nor nan, where nothing could be graded
            state.stale_evaluations += 1
            if state.stale_evaluations >= (settings.early_stopping_patience or math.inf):
                self.monitor.stop("early_stopping")
            return
        state.best_accuracy, state.best_step, state.stale_evaluations = accuracy, state.step, 0
        if settings.load_best_model_at_end and self.accelerator.is_main_process:
            self.best.save(self.model, self.tokenizer, state.step)
            if self.journal.folder is not None and self.journal.folder.latest_checkpoint() is None:
                self.best.keep_only(state.step)
        self.accelerator.wait_for_everyone()

    def _open_folder(self, resume: bool) -> bool:
        """Open ``run.output_dir`` and load its newest checkpoint; whether there was one."""
        checkpoint = None
        if self.accelerator.is_main_process:
            self.journal.folder = RunFolder.open(self.args.run.output_dir, resume)
            checkpoint = self.journal.folder.latest_checkpoint() if resume else None
        (checkpoint,) = broadcast_object_list([checkpoint])
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))
            self.callbacks.load_state(checkpoint)
            self.sampler.engine.sync()
            self.journal.say(f"Going on from {checkpoint}.")
        if self.journal.folder is not None:
            self.journal.folder.rewind(self.state.step if checkpoint is not None else None)
            if changed := self.journal.folder.write_config(self.args):
                self.journal.warn("changed_settings", f"The run began with other settings: {changed}.", self.state.step)
        if self.args.run.report_to:
            self.accelerator.init_trackers("vpd", config={"config": self.args.model_dump_json()})
        return checkpoint is not None

    def _save_checkpoint(self) -> None:
        """Save what a resume needs. All processes write into one folder, which then takes its name at once."""

        def write(folder: Path) -> None:
            (target,) = broadcast_object_list([str(folder)])
            self.accelerator.save_state(target)
            if self.accelerator.is_main_process:
                self.callbacks.save_state(Path(target))
            self.accelerator.wait_for_everyone()

        if self.journal.folder is not None:
            self.journal.folder.commit_checkpoint(self.state.step, write, self.args.run.save_total_limit)
            # Older ones served earlier checkpoints only, and a resume takes the newest.
            self.best.keep_only(self.state.best_step)
        else:
            write(Path())
        self.callbacks.save()

    def _log_step(self, step: int, metrics: dict[str, Any], batch: Batch, numbers: dict[int, TokenNumbers]) -> None:
        self.journal.log_step(step, metrics)
        self.callbacks.log(step, metrics)
        self.monitor.watch(metrics)
        if self.journal.folder is not None and self.args.run.logged_samples:
            records = [
                RolloutRecord.from_rollout(step, rollout, view, **(asdict(numbers[i]) if i in numbers else {}))
                for i, (rollout, view) in enumerate(zip(batch.rollouts, batch.views, strict=True))
            ]
            self.journal.folder.write_rollouts(step, records[: self.args.run.logged_samples])

    def _speed(self, timer: Timer, batch: Batch, seconds: float, counts: TokenCounts) -> dict[str, float]:
        sampled, computed, padded = self.learner.total(batch.token_count, counts.computed, counts.padded)
        phases = timer.seconds | batch.seconds
        training = phases["e_step"] + phases["m_step"]
        return {
            "tokens_rollout": sampled,
            "tokens_computed": computed,
            "tokens_padded": padded,
            "tokens_per_second_rollout": sampled / phases["rollout"] if phases["rollout"] else 0.0,
            "tokens_per_second_train": computed / training if training else 0.0,
            **{f"seconds_{phase}": value for phase, value in phases.items()},
            "seconds": seconds,
            "peak_memory_gb": peak_memory_bytes() / 2**30,
        }
