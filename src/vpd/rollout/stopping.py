"""Tells where a completion ends: at end-of-sequence tokens and stop strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

MARGIN = 4
"""How many tokens are decoded beyond those that a stop string can span: decoders treat the first token differently (a
leading space), and a character may begin in an earlier token."""


class StopCondition:
    """Tells whether a completion ends with its newest token.

    A stop string ends a completion with the first token after which the decoded completion contains the string.

    Args:
        tokenizer: The tokenizer that decodes completions in search of stop strings.
        eos_token_ids: The tokens that end a completion.
        stop_strings: The strings that end a completion; none is empty.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int], stop_strings: Sequence[str] = ()
    ):
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._stop_strings = tuple(stop_strings)
        # A token writes at least a byte, so no stop string spans more tokens than it has bytes.
        self._window = max((len(string.encode()) for string in stop_strings), default=0) + MARGIN
        self._completes: dict[int, bool] = {}

    def __call__(self, completion_ids: list[int]) -> bool:
        """Whether a completion that had not ended before ends with its last token."""
        token = completion_ids[-1]
        if token in self._eos_token_ids:
            return True
        if not self._stop_strings or not self._may_complete(token):
            return False
        text = self._decode(completion_ids[-self._window :])
        return any(string in text for string in self._stop_strings)

    def _may_complete(self, token: int) -> bool:
        """Whether the token can write the last character of a stop string; most tokens cannot and need no decoding."""
        if token not in self._completes:
            # Twice, because a decoder may drop the space before the first token.
            text = self._decode([token, token])
            # The replacement character stands for bytes that are a part of some character.
            endings = {"\ufffd", *(string[-1] for string in self._stop_strings)}
            self._completes[token] = any(ending in text for ending in endings)
        return self._completes[token]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
