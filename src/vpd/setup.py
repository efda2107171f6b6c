"""Makes the parts of a run from its settings: the policy, the sampler, the feedback, the measurements, the folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from vpd.algorithms.base import Algorithm
from vpd.config import ConfigError, VPDConfig
from vpd.environments import SPLITS, Environment
from vpd.environments.curriculum import Curriculum
from vpd.evaluation import Evaluator
from vpd.feedback import (
    Critic,
    EndpointCritic,
    FeedbackSource,
    FeedbackTexts,
    PromptBuilder,
    SelfCritic,
    make_sources,
)
from vpd.monitoring.callbacks import Callbacks, training_arguments
from vpd.monitoring.journal import Journal
from vpd.monitoring.measurements import Measurements
from vpd.monitoring.monitor import Monitor
from vpd.policy.copies import PREVIOUS, make_copies
from vpd.policy.cpu import keep_freed_memory
from vpd.policy.learner import Learner
from vpd.policy.load import eos_token_ids
from vpd.policy.module import PolicyModule
from vpd.policy.optimizer import make_optimizer, make_scheduler
from vpd.policy.prepare import check_layers, make_accelerator, prepare_policy
from vpd.rollout import RolloutSampler, make_engine
from vpd.runs.checkpoints import Checkpoints
from vpd.runs.state import TrainingState


@dataclass(frozen=True)
class Parts:
    """The parts that a trainer works with.

    Attributes:
        algorithm: Updates the policy on the rollouts.
        accelerator: Places, wraps and saves what trains.
        learner: The wrapped policy with its optimizer.
        lr_scheduler: The learning rate's schedule, which advances once a rollout batch.
        prompts: Makes the student's and the teacher's prompts.
        sampler: Samples completions from the student and has them judged.
        sources: The sources of feedback, in order of preference.
        curriculum: Says which tasks a batch holds.
        evaluator: Measures the policy that the sampler samples from.
        run_state: The numbers that a resumed run goes on from.
        journal: Writes what happens to the screen, to the run's folder and to the trackers.
        monitor: Warns, and ends the run where the settings ask for that.
        measurements: Makes the evaluations, and has the journal tell of them.
        checkpoints: Opens the run's folder, and saves what a resume needs.
        callbacks: The callbacks of transformers with their state.
    """

    algorithm: Algorithm
    accelerator: Accelerator
    learner: Learner
    lr_scheduler: Any
    prompts: PromptBuilder
    sampler: RolloutSampler
    sources: Sequence[FeedbackSource]
    curriculum: Curriculum
    evaluator: Evaluator
    run_state: TrainingState
    journal: Journal
    monitor: Monitor
    measurements: Measurements
    checkpoints: Checkpoints
    callbacks: Callbacks


def checked(args: VPDConfig | None) -> VPDConfig:
    """Return the settings, by default all defaults; raise ConfigError where they are somebody else's."""
    if args is not None and not isinstance(args, VPDConfig):
        raise ConfigError(
            f"args must be a VPDConfig, not {type(args).__name__}: VPDConfig.from_trl(args) translates TRL's "
            "GRPOConfig."
        )
    return args or VPDConfig()


def with_steps(args: VPDConfig, environment: Environment) -> VPDConfig:
    """Replace ``run.num_train_epochs`` by the number of steps that it comes to, unless ``run.max_steps`` is given."""
    run = args.run
    if run.num_train_epochs is None or "max_steps" in run.model_fields_set:
        return args
    steps = math.ceil(run.num_train_epochs * len(environment.tasks("train")) / args.rollout.prompts_per_step)
    return args.model_copy(update={"run": run.model_copy(update={"max_steps": steps})})


def make_policy(
    args: VPDConfig,
    model: str | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: Any,
) -> tuple[PolicyModule, PreTrainedTokenizerBase]:
    """Make the network ready for training, and its tokenizer.

    Raises:
        ConfigError: The model cannot be loaded, or cannot be trained with these settings.
    """
    algorithm = args.make_algorithm()
    policy, tokenizer = prepare_policy(model, tokenizer, args.model, peft_config, algorithm.teacher_adapter())
    check_layers(policy, algorithm.matched_layers())
    return policy, tokenizer


def assemble(
    args: VPDConfig,
    policy: PolicyModule,
    tokenizer: PreTrainedTokenizerBase,
    environment: Environment,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    sources: Sequence[FeedbackSource] | None = None,
) -> Parts:
    """Make all parts of a run.

    Args:
        args: All settings.
        policy: The policy that :func:`make_policy` made.
        tokenizer: The policy's tokenizer.
        environment: Holds the tasks and judges completions.
        callbacks: The ``TrainerCallback`` objects of transformers.
        optimizers: An optimizer and a scheduler in place of those that ``args.optim`` describes.
        sources: The sources of feedback, in place of those that ``args.feedback.sources`` names.

    Raises:
        ConfigError: Settings cannot work together, or a prompt is too long.
    """
    callback_args = training_arguments(args)
    algorithm: Algorithm = args.make_algorithm()
    _check_judge(args, algorithm, environment)
    accelerator = make_accelerator(args, algorithm.teacher_adapter() is not None)
    keep_freed_memory(accelerator.device)
    journal = Journal(accelerator)
    learner, lr_scheduler = _make_learner(args, algorithm, policy, accelerator, optimizers)
    algorithm.prepare(learner, tokenizer, args.model)
    model = learner.module.model
    prompts = PromptBuilder(tokenizer, args.feedback, args.rollout.max_prompt_length, args.model.chat_template_kwargs)
    sampler = RolloutSampler(
        make_engine(model, tokenizer, args.rollout),
        tokenizer,
        environment,
        prompts,
        args.rollout,
        eos_token_ids(model, tokenizer),  # pyright: ignore[reportArgumentType]
        truncated_fails=args.algorithm.truncated != "judge",
    )
    if sources is None:
        sources = make_sources(args.feedback, _make_critic(args, algorithm, sampler))
    evaluator = Evaluator(sampler, environment, args, accelerator, sources)
    curriculum = Curriculum(
        environment.stages(), args.rollout.prompts_per_step, args.rollout.next_stage_at, args.run.seed
    )
    _check_prompts(environment, prompts)
    run_state = TrainingState()
    told = Callbacks(callbacks, callback_args, model, tokenizer, learner.optimizer, lr_scheduler, accelerator)
    environment.trainer_state = told.state
    needed = [source.name for source in sources] if algorithm.needs_feedback else None
    monitor = Monitor(journal, run_state, needed, args.run.stop_on, args.algorithm.threshold)
    saved = {"scheduler": lr_scheduler, "run": run_state, "curriculum": curriculum, "algorithm": algorithm}
    saved |= learner.parts()
    return Parts(
        algorithm=algorithm,
        accelerator=accelerator,
        learner=learner,
        lr_scheduler=lr_scheduler,
        prompts=prompts,
        sampler=sampler,
        sources=sources,
        curriculum=curriculum,
        evaluator=evaluator,
        run_state=run_state,
        journal=journal,
        monitor=monitor,
        measurements=Measurements(evaluator, journal, run_state, monitor, args.eval),
        checkpoints=Checkpoints(args.run, accelerator, run_state, saved, told, model, tokenizer),
        callbacks=told,
    )


def _make_learner(
    args: VPDConfig,
    algorithm: Algorithm,
    policy: PolicyModule,
    accelerator: Accelerator,
    optimizers: tuple[torch.optim.Optimizer | None, Any],
) -> tuple[Learner, Any]:
    """Wrap the policy for training, and make its optimizer and its scheduler."""
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = optimizers[0] or make_optimizer(args.optim, trainable)
    lr_scheduler = optimizers[1] or make_scheduler(args.optim, optimizer, args.run.max_steps)
    extrapolation = {PREVIOUS: 0.0} if args.optim.extrapolation else {}
    copies = make_copies(policy, {**algorithm.weight_copies(), **extrapolation})
    prepared, prepared_optimizer = accelerator.prepare(policy, optimizer)
    for weights in copies.values():
        weights.to(accelerator.device)
    temperature = args.rollout.temperature
    learner = Learner(prepared, prepared_optimizer, accelerator, args.optim, temperature, copies=copies)
    return learner, lr_scheduler


def _make_critic(args: VPDConfig, algorithm: Algorithm, sampler: RolloutSampler) -> Critic | None:
    """Make the critic that writes critiques; None where nobody reads one."""
    settings = args.feedback
    if "critique" not in settings.sources or not algorithm.reads_feedback:
        return None
    if settings.critique.endpoint is not None:
        return EndpointCritic(settings.critique)
    return SelfCritic(lambda chats, seed: sampler.answer(chats, settings.critique, seed))


def _check_judge(args: VPDConfig, algorithm: Algorithm, environment: Environment) -> None:
    """Refuse tasks without a judge where something asks for verdicts."""
    if environment.judges:
        return
    if algorithm.needs_verdicts:
        raise ConfigError(
            f'algorithm.type = "{args.algorithm.type}" learns from verdicts, but these tasks have no judge: give '
            "reward_funcs (data.reward_funcs), or an environment."
        )
    if args.optim.extrapolation:
        raise ConfigError("optim.extrapolation goes by a score, but these tasks have no judge: leave it out.")


def _check_prompts(environment: Environment, prompts: PromptBuilder) -> None:
    """Refuse a task whose prompt is too long now, and not hours into the run."""
    tasks = [task for split in SPLITS for task in environment.tasks(split)]
    if not tasks:
        raise ConfigError("The environment has no tasks.")
    longest = max(tasks, key=lambda task: len(prompts.student(task.prompt)))
    prompts.teacher(longest.prompt, FeedbackTexts("sibling", False, solution="", feedback=""))
