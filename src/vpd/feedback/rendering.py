"""Renders chats with the tokenizer's chat template, also those whose contents are given as parts."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from vpd.config import ConfigError
from vpd.types import Messages, content_text, is_plain_text


class ChatRenderer:
    """Renders a chat up to where the assistant's answer begins.

    Contents that are lists of text parts stay lists where the chat template reads them. To other templates, which would
    write the list's Python text into the prompt, each content is given as one text, its parts one a line.

    Args:
        tokenizer: A tokenizer with a chat template.
        chat_template_kwargs: Arguments for the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._chat_template_kwargs = chat_template_kwargs

    def __call__(self, messages: Messages) -> str:
        """Render the chat; a plain text is its own rendering.

        Raises:
            ConfigError: A content has parts other than texts.
        """
        if is_plain_text(messages):
            return str(messages[0]["content"])
        if any(isinstance(message.get("content"), list) for message in messages):
            for message in messages:
                _check_parts(message.get("content"))
            if not self._reads_parts:
                messages = [{**message, "content": content_text(message["content"])} for message in messages]
        return self._apply(messages)

    def _apply(self, messages: Messages) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._chat_template_kwargs
            )
        )

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template writes a content of one part as it writes the same text."""
        text = "text"
        try:
            return self._apply([{"role": "user", "content": [{"type": "text", "text": text}]}]) == self._apply(
                [{"role": "user", "content": text}]
            )
        except Exception:
            # A template may fail on a list in any way, such as by a method that only texts have.
            return False


def surrounded(content: Any, before: str, after: str) -> Any:
    """Put texts around a message's content: into the first and the last part, where it is given as parts."""
    if not isinstance(content, list):
        return f"{before}{content}{after}"
    _check_parts(content)
    parts = [dict(part) for part in content] or [{"type": "text", "text": ""}]
    parts[0]["text"] = f"{before}{parts[0]['text']}"
    parts[-1]["text"] = f"{parts[-1]['text']}{after}"
    return parts


def _check_parts(content: Any) -> None:
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ConfigError(
                f"A prompt's content has a part of the type {kind!r}, but only texts can be trained on: give parts "
                'such as {"type": "text", "text": "..."}, or the content as a text.'
            )
