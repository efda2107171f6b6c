"""Critiques of failed attempts, by the model itself or by one behind an OpenAI-compatible endpoint.

The critic is given the problem, the attempt and the reference answer, and writes two or three sentences that say what
went wrong without stating the answer (VPD, arXiv 2605.15113). A critique takes a sibling's place in the teacher's
prompt, also in groups that all failed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from vpd.config import CritiqueSettings
from vpd.endpoint import Endpoint
from vpd.feedback.texts import without_thinking
from vpd.loop import run_all
from vpd.types import Messages, Rollout, content_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a chat model has answered, with what the answers took of this process.

    Attributes:
        texts: The answer to each chat, or None where there is none.
        token_count: How many tokens the trained network has sampled for them.
        seconds: The wall-clock seconds of sampling.
    """

    texts: list[str | None]
    token_count: int = 0
    seconds: float = 0.0


Complete = Callable[[Sequence[Messages], int], Answers]
"""Answers chats; the number is the seed of the draws."""

_REQUEST = """Problem:
{prompt}

A student's attempt:
{attempt}

{reference}Write two or three sentences to the student about what is wrong with the attempt and how to go about it \
better. Do not state the answer, and do not solve the problem."""
_REFERENCE = """The right answer, for your eyes only:
{reference}

"""


class Critic(Protocol):
    """Writes critiques."""

    def write(self, rollouts: Sequence[Rollout], seed: int) -> Answers:
        """Write a critique of each rollout; a rollout that cannot be criticised has None.

        Args:
            rollouts: The failed attempts.
            seed: The seed of the draws, for a critic that draws in this process.
        """
        ...


class SelfCritic:
    """The network that is trained, asked in one batch.

    Args:
        complete: Samples one answer to each chat.
    """

    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def write(self, rollouts: Sequence[Rollout], seed: int) -> Answers:
        answers = self._complete([request(rollout) for rollout in rollouts], seed)
        return replace(answers, texts=[critique_in(answer) for answer in answers.texts])


class EndpointCritic:
    """A model behind an endpoint. A question that fails, after its retries, leaves its rollout without a critique."""

    def __init__(self, settings: CritiqueSettings) -> None:
        assert settings.endpoint is not None
        self._endpoint = Endpoint(settings.endpoint.model_copy(update={"max_tokens": settings.max_tokens}))

    def write(self, rollouts: Sequence[Rollout], seed: int) -> Answers:
        answers = run_all([self._ask(request(rollout)) for rollout in rollouts])
        return Answers([critique_in(answer) for answer in answers])

    async def _ask(self, messages: Messages) -> str | None:
        try:
            return await self._endpoint.ask(messages)
        except Exception as error:
            logger.warning("The critic failed: %s: %s", type(error).__name__, error)
            return None


def request(rollout: Rollout) -> Messages:
    """Write the chat that asks for a critique; it shows the attempt as a reader would see it, without its thinking."""
    prompt = "\n\n".join(
        content_text(message["content"]) for message in rollout.task.prompt if message["role"] != "system"
    )
    reference = rollout.task.reference
    content = _REQUEST.format(
        prompt=prompt,
        attempt=without_thinking(rollout.text),
        reference="" if reference is None else _REFERENCE.format(reference=reference),
    )
    return [{"role": "user", "content": content}]


def critique_in(answer: str | None) -> str | None:
    """Find the critique in a critic's answer; None for an answer that says nothing."""
    text = without_thinking(answer or "")
    return text or None
