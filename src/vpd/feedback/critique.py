"""Critiques of failed attempts, by the model itself or by one behind an OpenAI-compatible endpoint.

The critic is given the problem, the attempt and the reference answer, and writes two or three sentences that say what
went wrong without stating the answer (VPD, arXiv 2605.15113). A critique takes a sibling's place in the teacher's
prompt, also in groups that all failed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from vpd.config import CritiqueSettings
from vpd.endpoint import Endpoint
from vpd.feedback.texts import without_thinking
from vpd.loop import run_all
from vpd.types import Messages, Rollout

logger = logging.getLogger(__name__)

Complete = Callable[[Sequence[Messages]], Sequence[str | None]]
"""From chats to an answer each; None where there is none."""

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
    """Whatever writes critiques."""

    def write(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        """A critique of each rollout; None where none could be had."""
        ...


class SelfCritic:
    """The network that is trained, asked in one batch.

    Args:
        complete: samples one answer to each chat.
    """

    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def write(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        answers = self._complete([request(rollout) for rollout in rollouts])
        return [critique_in(answer) for answer in answers]


class EndpointCritic:
    """A model behind an endpoint. A question that fails, after its retries, leaves its rollout without a critique."""

    def __init__(self, settings: CritiqueSettings) -> None:
        assert settings.endpoint is not None
        self._endpoint = Endpoint(settings.endpoint.model_copy(update={"max_tokens": settings.max_tokens}))

    def write(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        return [critique_in(answer) for answer in run_all([self._ask(request(rollout)) for rollout in rollouts])]

    async def _ask(self, messages: Messages) -> str | None:
        try:
            return await self._endpoint.ask(messages)
        except Exception as error:
            logger.warning("The critic failed: %s: %s", type(error).__name__, error)
            return None


def request(rollout: Rollout) -> Messages:
    """The chat that asks for a critique. The attempt is shown as a reader would see it, without its thinking."""
    prompt = "\n\n".join(str(message["content"]) for message in rollout.task.prompt if message["role"] != "system")
    reference = rollout.task.reference
    content = _REQUEST.format(
        prompt=prompt,
        attempt=without_thinking(rollout.text),
        reference="" if reference is None else _REFERENCE.format(reference=reference),
    )
    return [{"role": "user", "content": content}]


def critique_in(answer: str | None) -> str | None:
    """What a critic's answer says, or None where it says nothing."""
    text = without_thinking(answer or "")
    return text or None
