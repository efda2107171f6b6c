"""Asks a chat model behind an OpenAI-compatible address, which is a judge or a critic."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from vpd.config import ConfigError, EndpointSettings
from vpd.types import Messages


class Endpoint:
    """Asks a chat model, with a limit on how many questions are on their way at a time.

    The client is openai's own. It tries again after answers with status 408, 409, 429 or 5xx and after lost
    connections; it waits longer each time, or as long as the server asks for.

    Args:
        settings: The address, the model and the limits.

    Raises:
        ConfigError: The package openai or the key is missing.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise ConfigError('An endpoint needs the package openai: pip install "vpd-rl[openai]".') from None
        key = os.environ.get(settings.api_key_env)
        if not key:
            raise ConfigError(
                f"The environment variable {settings.api_key_env} holds no key for {settings.base_url}: set it (to any "
                f"text for a server that asks for none), or name another by endpoint.api_key_env."
            )
        self.settings = settings
        self._client = AsyncOpenAI(
            base_url=settings.base_url, api_key=key, timeout=settings.timeout, max_retries=settings.max_retries
        )
        self._free = asyncio.Semaphore(settings.concurrency)

    async def ask(self, messages: Messages) -> str:
        """Ask for the model's answer to a chat.

        Raises:
            openai.OpenAIError: All tries have failed.
            ValueError: The answer is empty.
        """
        options = {"temperature": self.settings.temperature, "max_tokens": self.settings.max_tokens}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        chat: Any = messages
        async with self._free:
            answer = await self._client.chat.completions.create(model=self.settings.model, messages=chat, **given)
        text = answer.choices[0].message.content if answer.choices else None
        if not text or not text.strip():
            raise ValueError(f"{self.settings.model} at {self.settings.base_url} gave an empty answer")
        return text
