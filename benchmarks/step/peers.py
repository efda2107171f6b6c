"""TRL's side of the comparison: its trainers as they are, with the same tasks, verdicts and texts.

Two things are overridden:

- The feedback. SDPOTrainer reads it from a dataset's column, with one text per prompt that is written before there is
  any rollout. Here its builder of teacher prompts gets the judge's text on each rollout, so that distillation is active
  on every rollout, as on our side. The texts have our headings for successes and failures.
- Some methods are wrapped to time them and to count tokens. Nothing that they compute is changed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl.experimental.sdpo.sdpo_trainer import SuccessfulRolloutTeacherContextBuilder
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from benchmarks.step import memory, models
from benchmarks.step.specs import LEARNING_RATE, Side, SideInfo, StepRecord, Workload
from benchmarks.step.tasks import ImposedVerdicts, needed_tokens
from vpd.config import Templates
from vpd.timing import Timer
from vpd.types import Task

Conduct = Callable[[SideInfo | StepRecord], None]


class Judge:
    """The imposed verdicts as a reward function that keeps the feedback on the last batch of rollouts."""

    def __init__(self, environment: ImposedVerdicts) -> None:
        self._environment = environment
        self.texts: list[str] = []

    def rewards(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        templates = Templates()
        verdicts = [
            self._environment.judge(Task("", prompt), completion[0]["content"])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        headings = {1.0: templates.feedback_on_success, 0.0: templates.feedback_on_failure}
        self.texts = [headings[verdict.reward].replace("{text}", verdict.feedback or "") for verdict in verdicts]
        return [verdict.reward for verdict in verdicts]


class FeedbackOnRollouts(SuccessfulRolloutTeacherContextBuilder):
    """TRL's builder of teacher prompts, with the judge's text on each rollout in place of the dataset's column."""

    def __init__(self, trainer: SDPOTrainer, judge: Judge) -> None:
        super().__init__(trainer)
        self._judge = judge

    def build(self, output: Any, prompts: Any, rewards: Any, feedbacks: Any = None) -> dict[str, torch.Tensor]:
        return super().build(output, prompts, rewards, feedbacks=self._judge.texts)


class Probe(TrainerCallback):
    """A probe that times the parts of each step, counts its tokens, and waits for the next turn between steps."""

    def __init__(
        self, trainer: SDPOTrainer | GRPOTrainer, workload: Workload, info: SideInfo, conduct: Conduct
    ) -> None:
        self._trainer, self._workload, self._info, self._conduct = trainer, workload, info, conduct
        self._reset()
        self._time(trainer, "_generate", "rollout", self._check_rollouts)
        self._time(trainer, "_calculate_rewards", "judge")
        self._time(trainer, "compute_loss", "forward")
        self._time(trainer.accelerator, "backward", "backward")
        if isinstance(trainer, SDPOTrainer):
            self._time(trainer.teacher_context_builder, "build", "contexts", self._check_contexts)
            self._count(trainer, "_forward_logits")
        else:
            self._count(trainer, "_get_per_token_logps_and_entropies")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._wait(self._info)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - self._start
        self.record.seconds = seconds
        self.record.phases = dict(self._timer.seconds)
        self.record.phases["optimizer"] = seconds - sum(self.record.phases.values())
        self.record.peak_bytes = memory.peak_bytes()
        self.record.tokens_needed, self.record.tokens_needed_jointly = needed_tokens(self._students, self._teachers)
        if self.record.rollouts != self._workload.rollouts:
            raise RuntimeError(f"{self.record.rollouts} of {self._workload.rollouts} rollouts took part.")
        losses = self._trainer._metrics["train"].pop("self_distillation/distillation_loss", [])
        self.record.divergence = sum(losses) / len(losses) if losses else None
        self._trainer._metrics["train"].clear()
        self._wait(self.record)

    def _wait(self, report: SideInfo | StepRecord) -> None:
        self._conduct(report)
        self._reset()
        memory.reset_peak()
        self._start = time.perf_counter()

    def _reset(self) -> None:
        self.record, self._timer = StepRecord(), Timer()
        self._students: list[list[int]] = []
        self._teachers: list[list[int]] = []

    def _time(self, owner: Any, name: str, phase: str, check: Callable[[Any], None] = lambda _: None) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._timer(phase):
                result = function(*args, **kwargs)
            check(result)
            return result

        setattr(owner, name, timed)

    def _count(self, trainer: Any, name: str) -> None:
        function = getattr(trainer, name)

        def counted(
            model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            self.record.tokens_computed += input_ids.numel()
            rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
            (self._students if torch.is_grad_enabled() else self._teachers).extend(rows)
            return function(model, input_ids, attention_mask, *args, **kwargs)

        setattr(trainer, name, counted)

    def _check_rollouts(self, generated: Any) -> None:
        lengths = {len(completion) for completion in generated[1]}
        if lengths != {self._workload.completion_tokens}:
            raise RuntimeError(f"The completions have {lengths} tokens.")
        self.record.rollouts = len(generated[1])
        self.record.tokens_sampled = sum(map(len, generated[1]))

    def _check_contexts(self, contexts: dict[str, torch.Tensor]) -> None:
        self.record.rollouts = int(contexts["self_distillation_mask"].sum())


def run(side: Side, workload: Workload, conduct: Conduct) -> None:
    """Make the trainer, then step whenever ``conduct`` returns; it takes a report and waits for the next turn."""
    tokenizer = models.tokenizer_of(side.model)
    environment = ImposedVerdicts(tokenizer, workload)
    idle = memory.resident_bytes()
    network = models.network(side.model, side.precision)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(side, workload, network, tokenizer, environment, folder)
        trainer.add_callback(Probe(trainer, workload, memory.side_info(idle, network), conduct))
        trainer.train()


def _trainer(
    side: Side,
    workload: Workload,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    environment: ImposedVerdicts,
    folder: str,
) -> SDPOTrainer | GRPOTrainer:
    micro_batch = side.micro_batch or workload.rollouts
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": side.precision == "autocast",
        "gradient_checkpointing": side.gradient_checkpointing,
        "per_device_train_batch_size": micro_batch,
        # One update learns from all rollouts of one generation, so that TRL needs no pass for the sampler's
        # log-probabilities.
        "gradient_accumulation_steps": workload.rollouts // micro_batch,
        "num_generations": workload.num_generations,
        "max_completion_length": workload.completion_tokens,
        "generation_kwargs": {"min_new_tokens": workload.completion_tokens},
        "mask_truncated_completions": False,
        "cache_implementation": side.cache,
        "temperature": 1.0,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_steps": 1_000_000,
        "shuffle_dataset": False,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    judge = Judge(environment)
    arguments: dict[str, Any] = {
        "model": network,
        "reward_funcs": judge.rewards,
        "train_dataset": Dataset.from_list([{"prompt": task.prompt} for task in environment.tasks("train")]),
        "processing_class": tokenizer,
    }
    if side.algorithm == "grpo":
        return GRPOTrainer(args=GRPOConfig(**settings, scale_rewards="none", epsilon_high=0.28, beta=0.0), **arguments)
    distillation = SDPOConfig(
        **settings,
        max_prompt_length=None,
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        teacher_model_kind="live",
        use_successful_as_teacher=False,
        include_environment_feedback=True,
        feedback_template="{feedback_raw}",
    )
    trainer = SDPOTrainer(args=distillation, **arguments)
    trainer.teacher_context_builder = FeedbackOnRollouts(trainer, judge)
    return trainer
