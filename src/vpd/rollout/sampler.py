"""Turns tasks into judged rollouts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from vpd.config import CritiqueSettings, RolloutSettings
from vpd.environments.base import Attempt, Environment
from vpd.environments.judging import described, judge_all
from vpd.feedback import Answers, PromptBuilder
from vpd.rollout.engine import RolloutEngine, Sample, SamplingParameters
from vpd.rollout.text import completion_text
from vpd.timing import Timer
from vpd.types import Messages, Rollout, Task, TeacherView, Turn, Verdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Judged rollouts, with what it took to make them.

    Attributes:
        rollouts: The judged rollouts.
        seed: The seed that they were sampled with.
        token_count: How many tokens were sampled.
        seconds: The wall-clock seconds of the phases ``rollout`` and ``judge``.
        judge_errors: What the judge itself failed with, one text for each rollout that is ungraded.
    """

    rollouts: list[Rollout]
    seed: int
    token_count: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    judge_errors: list[str] = field(default_factory=list)


@dataclass
class RolloutSampler:
    """Samples completions from the policy and has them judged.

    Attributes:
        engine: The rollout engine.
        tokenizer: Decodes completions for the judge.
        environment: The judge.
        prompts: Makes the student's prompts.
        settings: The settings of rollouts.
        eos_token_ids: The tokens that end a completion.
        truncated_fails: Whether a completion that the length limit ended has failed, and is not judged.
    """

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    environment: Environment
    prompts: PromptBuilder
    settings: RolloutSettings
    eos_token_ids: tuple[int, ...]
    truncated_fails: bool = False

    def sample(
        self,
        tasks: Sequence[Task],
        num_generations: int,
        seed: int,
        *,
        first_group: int = 0,
        group_stride: int = 1,
        cut: Mapping[str, float] | None = None,
    ) -> Sampled:
        """Sample and judge ``num_generations`` rollouts of each task; those of one task are next to each other.

        Args:
            tasks: The tasks, each of which makes one group.
            num_generations: How many rollouts a group has, N.
            seed: The seed of the draws.
            first_group: The number of the first group among those of all processes.
            group_stride: How far apart the numbers of two neighbouring groups are.
            cut: Replaces the run's ``temperature`` (0 is greedy), ``top_p``, ``top_k`` and ``min_p``.
        """
        prompts = [self.prompts.student(task.prompt) for task in tasks]
        parameters = self._parameters(num_generations, cut)
        groups = range(first_group, first_group + len(tasks) * group_stride, group_stride)
        return self._sample(prompts, tasks, groups, parameters, seed, as_teacher=False)

    def sample_teacher(self, prompts: Sequence[list[int]], tasks: Sequence[Task], seed: int) -> Sampled:
        """Sample and judge one rollout of the teacher for each of its prompts.

        Args:
            prompts: The teacher's prompts as token ids.
            tasks: The task of each prompt.
            seed: The seed of the draws.
        """
        return self._sample(prompts, tasks, range(len(tasks)), self._parameters(1), seed, as_teacher=True)

    def sample_again(self, rollouts: Sequence[Rollout], views: Sequence[TeacherView], seed: int) -> Sampled:
        """Let the teacher answer the task of each rollout once more, after it has read the feedback on it.

        Args:
            rollouts: The rollouts, of one turn each.
            views: The teacher's prompt for each of them.
            seed: The seed of the draws.

        Returns:
            One judged rollout for each. Each is of the first rollout's group and has the student's prompt, as if the
            student had written it; its log-probabilities are the teacher's.
        """
        sampled = self.sample_teacher(
            [view.first.prompt_ids for view in views], [rollout.task for rollout in rollouts], seed
        )
        answers = [
            replace(answer, group=own.group, turns=[replace(answer.turns[0], prompt_ids=own.turns[0].prompt_ids)])
            for own, answer in zip(rollouts, sampled.rollouts, strict=True)
        ]
        return replace(sampled, rollouts=answers)

    def answer(self, chats: Sequence[Messages], settings: CritiqueSettings, seed: int) -> Answers:
        """Let the network answer each chat once; a chat that is too long for the teacher's limit gets no answer.

        Args:
            chats: The chats.
            settings: The largest length of an answer and the temperature.
            seed: The seed of the draws.
        """
        prompts = [self.prompts.chat(chat) for chat in chats]
        fitting = {index: prompt for index, prompt in enumerate(prompts) if prompt is not None}
        parameters = SamplingParameters(
            max_new_tokens=settings.max_tokens,
            temperature=settings.temperature,
            eos_token_ids=frozenset(self.eos_token_ids),
        )
        timer = Timer()
        with timer("critique"):
            samples = self.engine.generate(list(fitting.values()), parameters, seed=seed)
        texts: list[str | None] = [None] * len(chats)
        for index, (sample,) in zip(fitting, samples, strict=True):
            texts[index] = completion_text(self.tokenizer, sample.token_ids, self.eos_token_ids)
        return Answers(texts, token_count=_token_count(samples), seconds=timer.seconds["critique"])

    def _parameters(self, num_generations: int, cut: Mapping[str, float] | None = None) -> SamplingParameters:
        settings = self.settings
        if cut is None:
            cut = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        return SamplingParameters(
            max_new_tokens=settings.max_completion_length,
            num_generations=num_generations,
            temperature=cut["temperature"],
            top_p=cut["top_p"],
            top_k=int(cut["top_k"]),
            min_p=cut["min_p"],
            stop_strings=settings.stop_strings,
            eos_token_ids=frozenset(self.eos_token_ids),
        )

    def _sample(
        self,
        prompts: Sequence[list[int]],
        tasks: Sequence[Task],
        groups: Sequence[int],
        parameters: SamplingParameters,
        seed: int,
        as_teacher: bool,
    ) -> Sampled:
        timer = Timer()
        with timer("rollout"):
            samples = self.engine.generate(prompts, parameters, seed=seed, as_teacher=as_teacher)
        rollouts = [
            self._rollout(task, group, prompt, sample)
            for task, group, prompt, generations in zip(tasks, groups, prompts, samples, strict=True)
            for sample in generations
        ]
        with timer("judge"):
            judged, errors = self._judge(rollouts)
        return Sampled(judged, seed, _token_count(samples), dict(timer.seconds), errors)

    def _rollout(self, task: Task, group: int, prompt: list[int], sample: Sample) -> Rollout:
        return Rollout(
            task=task,
            group=group,
            turns=[
                Turn(
                    prompt_ids=prompt,
                    completion_ids=sample.token_ids,
                    log_probs=sample.log_probs,
                    truncated=sample.truncated,
                    text=completion_text(self.tokenizer, sample.token_ids, self.eos_token_ids),
                )
            ],
        )

    def _judge(self, rollouts: list[Rollout]) -> tuple[list[Rollout], list[str]]:
        """Grade every rollout; returns the graded rollouts and what the judge itself failed with.

        What the length limit cut off is told so. Where ``truncated_fails``, it gets reward 0, whatever the judge would
        find in it. A rollout whose judge failed stays without a verdict, and the log says why.
        """
        if not self.environment.judges:
            return rollouts, []
        asked = [i for i, rollout in enumerate(rollouts) if not (rollout.truncated and self.truncated_fails)]
        attempts = [Attempt(r.task, r.text, r.turns[-1].completion_ids) for r in (rollouts[i] for i in asked)]
        outcomes = dict(zip(asked, judge_all(self.environment, attempts, self.settings.judge_seconds), strict=True))
        judged, errors = [], []
        for index, rollout in enumerate(rollouts):
            outcome = outcomes.get(index, Verdict(0.0))
            if isinstance(outcome, Verdict):
                verdict = self._told_of_truncation(rollout, outcome) if rollout.truncated else outcome
                judged.append(replace(rollout, verdict=verdict))
            else:
                judged.append(rollout)
                errors.append(described(outcome))
        for text, count in Counter(errors).items():
            logger.warning("The judge failed on %d of %d completions: %s", count, len(rollouts), text)
        return judged, errors

    def _told_of_truncation(self, rollout: Rollout, verdict: Verdict) -> Verdict:
        texts = (verdict.feedback, self.environment.truncated_feedback(rollout.task))
        feedback = "\n".join(text for text in texts if text)
        return replace(verdict, feedback=feedback, details={**verdict.details, "truncated": True})


def _token_count(samples: Sequence[Sequence[Sample]]) -> int:
    return sum(len(sample.token_ids) for generations in samples for sample in generations)
