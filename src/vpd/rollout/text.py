"""Turns a completion's tokens into the text that its judge reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase


def completion_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], eos_token_ids: Collection[int]
) -> str:
    """Decode a completion without the tokens that end a turn and without padding.

    All other special tokens stay as text: many tokenizers have ``<think>`` or ``<tool_call>`` among them, and a judge
    needs to see those.
    """
    dropped = [*eos_token_ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
    kept = [token for token in token_ids if token not in dropped]
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
