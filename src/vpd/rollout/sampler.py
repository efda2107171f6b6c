"""Tasks -> judged rollouts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from vpd.config import CritiqueSettings, RolloutSettings
from vpd.environments.base import Environment
from vpd.environments.judging import judge_all
from vpd.feedback.prompts import PromptBuilder
from vpd.rollout.local import LocalEngine, Sample
from vpd.timing import Timer
from vpd.types import Messages, Rollout, Task, Verdict

logger = logging.getLogger(__name__)


@dataclass
class RolloutSampler:
    """Samples completions from the policy and has them judged.

    Attributes:
        engine: the rollout engine.
        tokenizer: decodes completions for the judge.
        environment: the judge.
        prompts: makes the student's prompts.
        settings: sampling settings.
        eos_token_ids: any of them ends a completion.
        timer: collects the seconds of the phases ``rollout`` and ``judge``.
        sampled_tokens: tokens sampled so far.
        last_judge_error: what the judge itself failed with most recently.
    """

    engine: LocalEngine
    tokenizer: PreTrainedTokenizerBase
    environment: Environment
    prompts: PromptBuilder
    settings: RolloutSettings
    eos_token_ids: tuple[int, ...]
    timer: Timer = field(default_factory=Timer)
    sampled_tokens: int = 0
    last_judge_error: str = ""

    def sample(
        self,
        tasks: Sequence[Task],
        num_generations: int,
        seed: int,
        *,
        first_group: int = 0,
        group_stride: int = 1,
        temperature: float | None = None,
        top_p: float | None = None,
    ) -> list[Rollout]:
        """``num_generations`` judged rollouts for each task, those of one task next to each other.

        Args:
            tasks: one group each.
            num_generations: N.
            seed: of the draws.
            first_group, group_stride: number the groups over all processes.
            temperature, top_p: in place of the run's; 0 is greedy.
        """
        prompts = [self.prompts.student(task.prompt) for task in tasks]
        samples = self._generate(prompts, num_generations, seed, temperature, top_p)
        rollouts = [
            self._rollout(task, first_group + index * group_stride, prompt, sample)
            for index, (task, prompt, group) in enumerate(zip(tasks, prompts, samples, strict=True))
            for sample in group
        ]
        return self._judged(rollouts)

    def sample_behind(self, prompts: Sequence[list[int]], tasks: Sequence[Task], seed: int) -> list[Rollout]:
        """One judged rollout of the teacher behind each of its prompts."""
        with self.engine.as_teacher():
            samples = self._generate(list(prompts), 1, seed, None, None)
        rollouts = [
            self._rollout(task, index, prompt, group[0])
            for index, (task, prompt, group) in enumerate(zip(tasks, prompts, samples, strict=True))
        ]
        return self._judged(rollouts)

    def answer(self, chats: Sequence[Messages], settings: CritiqueSettings) -> list[str | None]:
        """One answer of the network to each chat, ended by the budget at the latest; None for a chat that is too long.

        The draws depend on the number of tokens sampled so far, which a resumed run has alike within a step.
        """
        prompts = [self.prompts.chat(chat) for chat in chats]
        fitting = [index for index, prompt in enumerate(prompts) if prompt is not None]
        with self.timer("critique"):
            samples = self.engine.generate(
                [prompt for prompt in prompts if prompt is not None],
                num_generations=1,
                max_new_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                eos_token_ids=set(self.eos_token_ids),
                stop_strings=[],
                seed=self.sampled_tokens,
            )
        answers: list[str | None] = [None] * len(chats)
        for index, (sample,) in zip(fitting, samples, strict=True):
            self.sampled_tokens += len(sample.token_ids)
            answers[index] = str(self.tokenizer.decode(sample.token_ids, skip_special_tokens=True))
        return answers

    def _generate(
        self, prompts: list[list[int]], num_generations: int, seed: int, temperature: float | None, top_p: float | None
    ) -> list[list[Sample]]:
        settings = self.settings
        with self.timer("rollout"):
            samples = self.engine.generate(
                prompts,
                num_generations=num_generations,
                max_new_tokens=settings.max_completion_length,
                temperature=settings.temperature if temperature is None else temperature,
                top_p=settings.top_p if top_p is None else top_p,
                top_k=settings.top_k,
                min_p=settings.min_p,
                eos_token_ids=set(self.eos_token_ids),
                stop_strings=settings.stop_strings,
                seed=seed,
            )
        self.sampled_tokens += sum(len(sample.token_ids) for group in samples for sample in group)
        return samples

    def _rollout(self, task: Task, group: int, prompt: list[int], sample: Sample) -> Rollout:
        return Rollout(
            task=task,
            group=group,
            prompt_ids=prompt,
            completion_ids=sample.token_ids,
            log_probs=sample.log_probs,
            truncated=sample.truncated,
            text=str(self.tokenizer.decode(sample.token_ids, skip_special_tokens=True)),
        )

    def _judged(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Grade every rollout.

        One that the length limit cut off gets reward 0 and a text that says so, whatever the judge would find in it.
        One whose judge broke stays without a verdict, and the log says why.
        """
        whole = [index for index, rollout in enumerate(rollouts) if not rollout.truncated]
        with self.timer("judge"):
            pairs = [(rollouts[i].task, rollouts[i].text) for i in whole]
            verdicts = judge_all(self.environment, pairs, self.settings.judge_seconds)
        judged = list(rollouts)
        for index, verdict in zip(whole, verdicts, strict=True):
            if isinstance(verdict, Verdict):
                judged[index] = replace(rollouts[index], verdict=verdict)
            else:
                logger.warning("The judge failed on task %s: %r", rollouts[index].task.id, verdict)
                self.last_judge_error = f"{type(verdict).__name__}: {verdict}"
        for index, rollout in enumerate(rollouts):
            if rollout.truncated:
                verdict = Verdict(0.0, self.environment.truncated_feedback(rollout.task), {"truncated": True})
                judged[index] = replace(rollout, verdict=verdict)
        return judged
