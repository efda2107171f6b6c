"""The EM loop: Variational Policy Distillation, Algorithm 1 (arXiv 2605.15113), from top to bottom.

One iteration samples a batch of prompts with N completions each, has them judged, builds the teacher's prompts from
the feedback, and hands the rollouts to the algorithm: on E-iterations the teacher is refined on outcomes, then its
token distribution is distilled into the student. Both are the same network.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, get_scheduler

from vpd import algorithms
from vpd.algorithms.example import Example, make_examples
from vpd.algorithms.m_step import TokenNumbers
from vpd.algorithms.warm_start import demonstration_sequences, warm_start
from vpd.config import ConfigError, VPDConfig
from vpd.environments import SPLITS, Environment, PromptDataset, make_environment
from vpd.evaluation import Evaluation, evaluate, measure_gap
from vpd.evaluation.statistics import batch_statistics
from vpd.feedback import FeedbackTexts, PromptBuilder, build_views
from vpd.policy.learner import Learner, TokenCounts
from vpd.policy.load import end_of_turn, eos_token_ids, save_policy
from vpd.policy.prepare import prepare_policy
from vpd.report import write_report
from vpd.rollout.local import LocalEngine, computes_bfloat16
from vpd.rollout.sampler import RolloutSampler
from vpd.runs.callbacks import Callbacks, training_arguments
from vpd.runs.files import RunError
from vpd.runs.folder import RunFolder
from vpd.runs.interrupt import InterruptGuard
from vpd.runs.memory import peak_memory_bytes
from vpd.runs.progress import Progress
from vpd.runs.samples import RolloutRecord
from vpd.runs.timing import Timer
from vpd.runs.warnings import batch_warnings
from vpd.types import Rollout, Task, TeacherView


@dataclass
class TrainingState:
    """What a resumed run must know besides weights, optimizer, scheduler and callbacks' state.

    Attributes:
        step: rollout batches done.
        train_seconds: spent in them, evaluations left aside.
        skipped_e_steps: E-iterations whose batch held one class only.
        rows: the final table so far.
    """

    step: int = 0
    train_seconds: float = 0.0
    skipped_e_steps: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@dataclass
class Batch:
    """The rollouts of one iteration on this process, with what the teacher reads."""

    rollouts: list[Rollout]
    is_success: list[bool]
    views: list[TeacherView | None]


class VPDTrainer:
    """Trains a causal language model from rewards and textual feedback.

    Args:
        model: a hub id, folder, GGUF file or short name, or a loaded model; by default ``args.model.name``.
        args: all settings.
        environment: tasks and judge; by default what ``args.data`` describes.
        train_dataset: rows with a ``prompt`` column, judged by ``reward_funcs``, in place of an environment.
        reward_funcs: functions with TRL's signature; each returns floats or (reward, feedback) pairs.
        eval_dataset: rows for the final split; by default cut off ``train_dataset``.
        processing_class: the tokenizer; by default the model's own.
        callbacks: transformers' ``TrainerCallback`` objects.
        optimizers: an optimizer and a scheduler in place of those that ``args.optim`` describes.
        peft_config: a PEFT config, to train adapters only; by default what ``args.model.lora`` describes.

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
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        self.args = args or VPDConfig()
        set_seed(self.args.run.seed)
        self.progress = Progress()
        policy, self.tokenizer = prepare_policy(model, processing_class, self.args.model, peft_config)
        self.environment = _choose_environment(self.args, environment, train_dataset, reward_funcs, eval_dataset)
        training_args = training_arguments(self.args)
        self.accelerator = _make_accelerator(self.args)

        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = optimizers[0] or _make_optimizer(self.args, trainable)
        self.scheduler = optimizers[1] or _make_scheduler(self.args, optimizer)
        prepared, prepared_optimizer = self.accelerator.prepare(policy, optimizer)
        self.learner = Learner(
            prepared, prepared_optimizer, self.accelerator, self.args.optim, self.args.rollout.temperature
        )
        self.model = self.learner.module.model
        self.prompts = PromptBuilder(
            self.tokenizer,
            self.args.feedback,
            self.args.rollout.max_prompt_length,
            self.args.model.chat_template_kwargs,
        )
        eos = eos_token_ids(self.model, self.tokenizer)  # pyright: ignore[reportArgumentType]
        engine = LocalEngine(self.model, self.tokenizer, self.args.rollout.dtype, self.args.rollout.batch_size)
        self.sampler = RolloutSampler(
            engine,
            self.tokenizer,
            self.environment,
            self.prompts,
            self.args.rollout,
            eos,
        )
        self.train_tasks = list(self.environment.tasks("train"))
        self._check_prompts()
        self.state = TrainingState()
        self.accelerator.register_for_checkpointing(self.state, self.scheduler)
        self.callbacks = Callbacks(
            callbacks or [],
            training_args,
            self.model,
            self.tokenizer,
            prepared_optimizer,
            self.scheduler,
            self.accelerator.is_main_process,
        )
        self.folder: RunFolder | None = None

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
        if not resumed:
            self._before_training()
        self.callbacks.train_begin()
        with self.progress, InterruptGuard() as guard:
            if self.accelerator.is_main_process:
                self.progress.start(self.args.run.max_steps, self.state.step)
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
            "interrupted": interrupted,
        }
        if self.folder is not None:
            self.folder.write_result(result)
            result["report"] = str(write_report(self.folder.path))
        return result

    def _iterate(self) -> None:
        """One rollout batch: sample, judge, give feedback, update (Algorithm 1, lines 3 to 17)."""
        start = time.perf_counter()
        step = self.state.step + 1
        set_seed(_mix(self.args.run.seed, step, self.accelerator.process_index))
        timer = self.sampler.timer = Timer()
        self.sampler.sampled_tokens, self.learner.tokens = 0, TokenCounts()
        self.callbacks.step_begin()

        batch = self.sample(step)
        metrics, numbers = self.update(batch, step, timer)
        with timer("sync"):
            self.scheduler.step()
            self.sampler.engine.sync()

        seconds = time.perf_counter() - start
        self.state.step = step
        self.state.train_seconds += seconds
        self.state.skipped_e_steps += metrics.get("e_step") == 0
        metrics |= self._speed(timer, seconds)
        self._log_step(step, metrics, batch, numbers)
        self.callbacks.step_end(step)
        control = self.callbacks.control
        # A callback may have asked on one process alone, and what follows needs all of them.
        evaluates, saves = self.learner.total(control.should_evaluate, control.should_save)
        if evaluates:
            self._evaluate_selection()
        if saves:
            self._save_checkpoint()

    def sample(self, step: int) -> Batch:
        """Sample and judge this process's share of rollout batch ``step``, and build the teacher's prompts."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        tasks = self.tasks_of_step(step)[process::processes]
        rollouts = self.sampler.sample(
            tasks,
            self.args.rollout.num_generations,
            seed=_mix(self.args.run.seed, step, process),
            first_group=process,
            group_stride=processes,
        )
        return self.with_feedback(rollouts)

    def with_feedback(self, rollouts: list[Rollout]) -> Batch:
        """Decide successes and build the teacher's prompts of judged rollouts."""
        threshold = self.args.algorithm.success_threshold
        is_success = [rollout.verdict is not None and rollout.verdict.reward >= threshold for rollout in rollouts]
        views = build_views(rollouts, is_success, self.prompts, permute=self.args.feedback.permute)
        if self.args.algorithm.truncated == "mask":
            views = [None if r.truncated else view for r, view in zip(rollouts, views, strict=True)]
        return Batch(rollouts, is_success, views)

    def update(
        self, batch: Batch, step: int, timer: Timer | None = None
    ) -> tuple[dict[str, Any], dict[int, TokenNumbers]]:
        """The algorithm's updates on one batch: metrics, and the numbers of each token by rollout index."""
        examples = make_examples(batch.rollouts, batch.is_success, batch.views)
        statistics = batch_statistics(
            batch.rollouts, batch.is_success, batch.views, self.learner.total, self.learner.largest
        )
        result = algorithms.update(
            self.learner,
            examples,
            self.args.algorithm,
            step,
            self.args.rollout.prompts_per_step,
            timer or Timer(),
            self._sampler_of_fresh_examples(step) if self.args.eval.margin_tasks else None,
        )
        learning_rate = self.learner.optimizer.param_groups[0]["lr"]
        return statistics | result.metrics | {"learning_rate": learning_rate}, result.tokens

    def tasks_of_step(self, step: int) -> list[Task]:
        """The prompts of rollout batch ``step``: epochs over the training tasks, each shuffled by seed and epoch."""
        count, size = len(self.train_tasks), self.args.rollout.prompts_per_step
        orders: dict[int, list[int]] = {}
        tasks = []
        for position in range((step - 1) * size, step * size):
            epoch, place = divmod(position, count)
            if epoch not in orders:
                orders[epoch] = list(range(count))
                random.Random(f"{self.args.run.seed}-{epoch}").shuffle(orders[epoch])
            tasks.append(self.train_tasks[orders[epoch][place]])
        return tasks

    def _sampler_of_fresh_examples(self, step: int) -> Callable[[], list[Example]]:
        def sample_fresh() -> list[Example]:
            process, processes = self.accelerator.process_index, self.accelerator.num_processes
            tasks = list(self.environment.tasks("selection"))[: self.args.eval.margin_tasks][process::processes]
            seed = _mix(self.args.run.seed, -step, process)
            batch = self.with_feedback(self.sampler.sample(tasks, self.args.rollout.num_generations, seed=seed))
            return make_examples(batch.rollouts, batch.is_success, batch.views)

        return sample_fresh

    def _is_finished(self, guard: InterruptGuard) -> bool:
        """Whether to stop; every process answers alike, since a signal or the clock may reach one alone."""
        out_of_time = self.args.run.max_seconds is not None and self.state.train_seconds >= self.args.run.max_seconds
        stop = guard.signal_number is not None or out_of_time or self.callbacks.control.should_training_stop
        return self.state.step >= self.args.run.max_steps or bool(self.learner.total(stop)[0])

    def _before_training(self) -> None:
        settings = self.args.warm_start
        self.sampler.engine.sync()
        self._add_row("base model")
        if settings.demonstrations:
            threshold = self.args.algorithm.success_threshold
            eos = end_of_turn(self.tokenizer)
            sequences = demonstration_sequences(self.environment, self.prompts, eos, settings.demonstrations, threshold)
            result = warm_start(self.learner, sequences, settings, self.tokenizer)
            self.sampler.engine.sync()
            how = f"{result.steps} steps, loss {result.loss:.3f}" if result.steps else f"found in {result.folder}"
            self._say(f"Warm start on {result.sequences} sequences: {how}, {result.seconds:.0f} s.")
            self._log(0, "warm_start", {"steps": result.steps, "loss": result.loss, "seconds": result.seconds})
            self._add_row("after warm start")
        if self.args.eval.preflight_tasks and self.args.run.max_steps:
            self._preflight()

    def _preflight(self) -> None:
        """Compare teacher and student before training; every process measures the same."""
        tasks = list(self.environment.tasks("selection"))[: self.args.eval.preflight_tasks]
        settings = self.args.rollout
        threshold = self.args.algorithm.success_threshold
        gap = measure_gap(self.sampler, tasks, settings.num_generations, threshold, _mix(self.args.run.seed, 0, 0))
        self._log(0, "preflight", asdict(gap))
        if not gap.n:
            self._warn("no_feedback", "Pre-flight: no rollout got any feedback, so there is nothing to distil.")
            return
        self._say(
            f"Pre-flight on {gap.n} selection tasks: teacher {gap.teacher_accuracy:.1%}, student "
            f"{gap.student_accuracy:.1%}, gap {gap.gap:+.1%} [{gap.low:+.1%}, {gap.high:+.1%}]."
        )
        if gap.low <= 0:
            self._warn(
                "no_gap",
                "The teacher is not clearly better than the student, so distilling it may do harm. Remedies: a warm "
                "start (warm_start.demonstrations), feedback that says more (data.feedback), or siblings' solutions "
                "(feedback.sources).",
            )

    def _after_training(self) -> None:
        if self.state.step:
            self._add_row(f"after {self.args.algorithm.type.upper()}", self.state.train_seconds)
        if self.folder is not None:
            try:
                save_policy(self.model, self.tokenizer, self.folder.path / "model")  # pyright: ignore
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

    def _add_row(self, name: str, train_seconds: float = 0.0) -> None:
        """Evaluate on the final split, for the table alone."""
        if self.args.eval.final_tasks == 0:
            return
        evaluation = self._evaluate("final", self.args.eval.final_tasks)
        row = {"name": name, **evaluation.summary(), "train_seconds": train_seconds}
        self.state.rows.append(row)
        self._log(self.state.step, "eval", {"split": "final", **row, "outcomes": evaluation.outcomes})
        self._say(
            f"Final split, {name}: {evaluation.accuracy:.1%} [{evaluation.low:.1%}, {evaluation.high:.1%}] of "
            f"{evaluation.n}, {evaluation.seconds:.0f} s."
        )

    def _evaluate_selection(self) -> None:
        evaluation = self._evaluate("selection", None)
        metrics = {"split": "selection", **evaluation.summary()}
        self._log(self.state.step, "eval", metrics)
        self._say(f"Selection split at step {self.state.step}: {evaluation.accuracy:.1%} of {evaluation.n}.")
        self.callbacks.evaluate(metrics)

    def _evaluate(self, split: Any, limit: int | None) -> Evaluation:
        timer, self.sampler.timer = self.sampler.timer, Timer()
        evaluation = evaluate(
            self.sampler,
            list(self.environment.tasks(split))[:limit],
            self.args.eval,
            self.args.algorithm.success_threshold,
            seed=_mix(self.args.run.seed, 0, 1),
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        self.sampler.timer = timer
        return evaluation

    def _open_folder(self, resume: bool) -> bool:
        """Open ``run.output_dir`` and load its newest checkpoint; whether there was one."""
        checkpoint = None
        if self.accelerator.is_main_process:
            self.folder = _open_run(self.args.run.output_dir, resume)
            checkpoint = self.folder.latest_checkpoint() if resume else None
        (checkpoint,) = broadcast_object_list([checkpoint])
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))
            self.callbacks.load_state(checkpoint)
            self.sampler.engine.sync()
            self._say(f"Going on from {checkpoint}.")
        if self.folder is not None:
            self.folder.rewind(self.state.step if checkpoint is not None else None)
            self.folder.write_config(self.args)
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

        if self.folder is not None:
            self.folder.commit_checkpoint(self.state.step, write, self.args.run.save_total_limit)
        else:
            write(Path())
        self.callbacks.save()

    def _log_step(self, step: int, metrics: dict[str, Any], batch: Batch, numbers: dict[int, TokenNumbers]) -> None:
        self._log(step, "train", metrics)
        self.callbacks.log(step, metrics)
        if self.accelerator.is_main_process:
            self.progress.step({"step": step, **metrics})
        for name, text in batch_warnings(metrics, list(self.args.feedback.sources)).items():
            self._warn(name, text, step)
        if self.args.run.report_to:
            self.accelerator.log({name: value for name, value in metrics.items() if value is not None}, step=step)
        if self.folder is not None and self.args.run.logged_samples:
            records = [
                RolloutRecord.from_rollout(step, rollout, view, **(asdict(numbers[i]) if i in numbers else {}))
                for i, (rollout, view) in enumerate(zip(batch.rollouts, batch.views, strict=True))
            ]
            self.folder.write_rollouts(step, records[: self.args.run.logged_samples])

    def _speed(self, timer: Timer, seconds: float) -> dict[str, float]:
        sampled, computed, padded = self.learner.total(
            self.sampler.sampled_tokens, self.learner.tokens.computed, self.learner.tokens.padded
        )
        phases = timer.seconds
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

    def _log(self, step: int, event: str, values: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.log(step, event, values)

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.progress.message(text)

    def _warn(self, name: str, text: str, step: int = 0) -> None:
        self._log(step, "warning", {"name": name, "text": text})
        self._say(f"Warning: {text}")


def _choose_environment(
    args: VPDConfig,
    environment: Environment | None,
    train_dataset: Any,
    reward_funcs: Any,
    eval_dataset: Any,
) -> Environment:
    if environment is not None:
        if train_dataset is not None or reward_funcs is not None:
            raise ConfigError("Give either an environment, or train_dataset with reward_funcs, not both.")
        return environment
    if train_dataset is not None or reward_funcs is not None:
        if train_dataset is None or reward_funcs is None:
            raise ConfigError("train_dataset and reward_funcs go together: one was given without the other.")
        return PromptDataset(train_dataset, reward_funcs, eval_dataset=eval_dataset)
    if args.data is None:
        raise ConfigError("There are no tasks: give an environment, a train_dataset with reward_funcs, or args.data.")
    return make_environment(args.data)


def _make_accelerator(args: VPDConfig) -> Accelerator:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wants_bfloat16 = args.model.autocast == "bfloat16" or (args.model.autocast == "auto" and computes_bfloat16(device))
    return Accelerator(
        mixed_precision="bf16" if wants_bfloat16 and args.model.dtype == "float32" else "no",
        log_with=list(args.run.report_to) or None,
        project_dir=args.run.output_dir,
        # Buffers (rotary frequencies) never change, and broadcasting them would tie scoring passes together.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def _open_run(folder: str, resume: bool) -> RunFolder:
    try:
        opened = RunFolder(folder, resume=resume)
    except OSError as error:
        raise ConfigError(f"run.output_dir = {folder!r} cannot be used: {error}.") from error
    if resume and opened.holds_a_run() and opened.latest_checkpoint() is None:
        raise ConfigError(
            f"The run in {folder} has no checkpoint to go on from (run.save_steps makes them): "
            "remove the folder, or choose another run.output_dir."
        )
    return opened


def _make_scheduler(args: VPDConfig, optimizer: torch.optim.Optimizer) -> Any:
    settings = args.optim
    try:
        return get_scheduler(
            settings.lr_scheduler_type,
            optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=args.run.max_steps,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"optim.lr_scheduler_type = {settings.lr_scheduler_type!r} cannot be used: {error}"
        ) from error


def _make_optimizer(args: VPDConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    settings = args.optim
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )


def _mix(*numbers: int) -> int:
    """One seed from several numbers, the same on every machine and in every process."""
    return random.Random(json.dumps(numbers)).getrandbits(31)
