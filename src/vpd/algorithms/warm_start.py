"""The warm start makes supervised steps on an environment's demonstrations before any reinforcement.

Half of the sequences are plain (prompt, answer), and half are conditioned on feedback (teacher's prompt, answer). A
small model cannot read feedback at first, and a teacher that cannot read it is worse than its student. A demonstration
gets the feedback that a rollout would get: a wrong attempt and the demonstrated answer are judged as a group, and the
model learns the answer conditioned on the attempt's teacher prompt. Every other attempt stands alone, as in a group
that failed as a whole, so that the model also learns the kinds of feedback that such groups get. Without feedback all
sequences are plain.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from vpd.algorithms.example import PromptedCompletion, imitated_view
from vpd.config import ConfigError, WarmStartSettings
from vpd.environments.base import Environment
from vpd.environments.judging import judge_all
from vpd.feedback import FeedbackSource, PromptBuilder, build_views, successes
from vpd.policy.learner import Learner, TrainingPass
from vpd.policy.load import load_weights, save_policy
from vpd.policy.model_cache import cache_dir
from vpd.policy.objectives import Imitate
from vpd.types import Demonstration, Rollout, Turn, Verdict, is_plain_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WarmStartResult:
    """What the warm start did.

    Attributes:
        sequences: How many sequences there are.
        steps: How many optimizer steps were made; 0 where the result was found in the cache.
        loss: The loss of the last step; nan where the result was found in the cache.
        seconds: The wall-clock seconds that it took.
        folder: The folder in the cache; None where the result is not cached.
    """

    sequences: int
    steps: int
    loss: float
    seconds: float
    folder: Path | None


def demonstration_sequences(
    environment: Environment,
    prompts: PromptBuilder,
    end_of_sequence: int,
    count: int,
    success_threshold: float | None,
    seed: int,
    sources: Sequence[FeedbackSource] | None = None,
) -> list[PromptedCompletion]:
    """Make the plain and the feedback-conditioned sequences of ``count`` demonstrations.

    Args:
        environment: The environment that has the demonstrations and judges them.
        prompts: Makes the student's and the teacher's prompts.
        end_of_sequence: The token that closes an answer in a chat; the tokenizer's own closes one to a plain text.
        count: How many demonstrations to take.
        success_threshold: The reward from which an answer succeeds; None where every demonstration counts as one.
        seed: The seed for whatever sources of feedback draw.
        sources: The sources of feedback, by default those of the prompts' settings; an empty list makes plain
            sequences alone.

    Raises:
        ConfigError: The environment has no demonstrations, or one of them is not a success.
    """
    demonstrations = environment.demonstrations(count)
    if not demonstrations:
        raise ConfigError(
            "warm_start.demonstrations is set, but this environment has no demonstrations: set it to 0, or choose an "
            "environment with worked answers."
        )
    groups = [_as_group(index, demonstration, prompts) for index, demonstration in enumerate(demonstrations)]
    rollouts = [rollout for group in groups for rollout in group]
    for rollout, verdict in zip(
        rollouts, judge_all(environment, [(rollout.task, rollout.text) for rollout in rollouts]), strict=True
    ):
        rollout.verdict = verdict if isinstance(verdict, Verdict) else None
    is_success = [bool(index % 2) for index in range(len(rollouts))]
    if success_threshold is not None:
        is_success = successes(rollouts, success_threshold)
    views = build_views(rollouts, is_success, prompts, seed=seed, sources=sources).views
    failed = [2 * index for index, demonstration in enumerate(demonstrations) if index % 2 and demonstration.attempt]
    attempts = [rollouts[i] for i in failed]
    alone = build_views(attempts, [False] * len(failed), prompts, seed=seed, sources=sources)
    for index, view in zip(failed, alone.views, strict=True):
        views[index] = view or views[index]
    sequences = []
    for index, demonstration in enumerate(demonstrations):
        attempt, answer = 2 * index, 2 * index + 1
        if not is_success[answer]:
            raise ConfigError(f"The demonstration of task {demonstration.task.id} is not a success for its own judge.")
        # The answer is tokenized apart from the prompt, as a rollout's tokens are sampled apart from it.
        plain = is_plain_text(demonstration.task.prompt)
        end = int(prompts.tokenizer.eos_token_id) if plain else end_of_sequence  # pyright: ignore[reportArgumentType]
        completion = prompts.completion(demonstration.completion, end)
        sequences.append(PromptedCompletion(rollouts[answer].turns[0].prompt_ids, completion))
        if (view := views[attempt]) is not None:
            sequences.append(PromptedCompletion(view.first.prompt_ids, completion))
    return sequences


def _as_group(index: int, demonstration: Demonstration, prompts: PromptBuilder) -> list[Rollout]:
    prompt_ids = prompts.student(demonstration.task.prompt)
    texts = [demonstration.attempt or demonstration.completion, demonstration.completion]
    return [Rollout(demonstration.task, index, [Turn(prompt_ids, [], [], False, text)]) for text in texts]


def warm_start(
    learner: Learner,
    sequences: Sequence[PromptedCompletion],
    settings: WarmStartSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> WarmStartResult:
    """Train on the sequences, or take the weights that an equal warm start left in the cache.

    A warm start that ends by the clock is not cached: its weights depend on the machine's speed.
    """
    start = time.perf_counter()
    cached = settings.cache and settings.max_seconds is None
    folder = cache_dir() / "warm-starts" / _key(learner, sequences, settings) if cached else None
    # Every process must find it: one that did not would wait for the others in training.
    (found,) = learner.total(folder is not None and folder.is_dir())
    if folder is not None and found == learner.accelerator.num_processes:
        load_weights(learner.module.model, folder)
        return WarmStartResult(len(sequences), 0, float("nan"), time.perf_counter() - start, folder)
    losses = _train(learner, sequences, settings)
    if folder is not None and learner.accelerator.is_main_process:
        try:
            save_policy(learner.module.model, tokenizer, folder)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            logger.warning("The warm start is not kept for other runs: %s", error)
    learner.accelerator.wait_for_everyone()
    return WarmStartResult(len(sequences), len(losses), losses[-1], time.perf_counter() - start, folder)


def _train(learner: Learner, sequences: Sequence[PromptedCompletion], settings: WarmStartSettings) -> list[float]:
    parameters = [parameter for parameter in learner.policy.parameters() if parameter.requires_grad]
    supervised = Learner(
        policy=learner.policy,
        optimizer=torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0),
        accelerator=learner.accelerator,
        settings=learner.settings,
        temperature=1.0,
    )
    process, processes = learner.accelerator.process_index, learner.accelerator.num_processes
    start = time.perf_counter()
    losses: list[float] = []
    for epoch in range(settings.epochs):
        order = list(sequences)
        random.Random(f"{settings.seed}-{epoch}").shuffle(order)
        for first in range(0, len(order), settings.batch_size):
            mine = order[first : first + settings.batch_size][process::processes]
            (token_count,) = supervised.total(sum(len(sequence.completion) for sequence in mine))

            def make_pass(part: list[PromptedCompletion], count: int = int(token_count)) -> TrainingPass:
                return TrainingPass(supervised.pack(part, imitated_view), Imitate(count))

            losses.append(supervised.optimise(supervised.micro_batches(mine, imitated_view), make_pass).loss)
            (out_of_time,) = supervised.total(
                settings.max_seconds is not None and time.perf_counter() - start > settings.max_seconds
            )
            if out_of_time:
                return losses
    return losses


def _key(learner: Learner, sequences: Sequence[PromptedCompletion], settings: WarmStartSettings) -> str:
    """Name the result by the weights before it, the data, and the settings that shape it."""
    digest = hashlib.sha256()
    for name, parameter in learner.module.model.named_parameters():
        sample = parameter.detach().flatten()
        numbers = [float(sample.double().sum()), *sample[:: max(1, sample.numel() // 16)].tolist()]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad} {numbers}".encode())
    digest.update(str([(sequence.prompt, sequence.completion) for sequence in sequences]).encode())
    digest.update(json.dumps(settings.model_dump(), sort_keys=True).encode())
    adapters = getattr(learner.module.model, "peft_config", {})
    digest.update(str(sorted((name, str(config)) for name, config in adapters.items())).encode())
    optim, accelerator = learner.settings, learner.accelerator
    digest.update(f"{optim.max_grad_norm} {accelerator.mixed_precision} {accelerator.num_processes}".encode())
    return digest.hexdigest()[:16]
