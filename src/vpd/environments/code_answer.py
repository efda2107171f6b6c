"""Finds the program in a completion."""

from __future__ import annotations

import warnings

from vpd.environments.answers import THINKING_END
from vpd.environments.fences import Block, read_blocks

_FORM = "the program must stand between ```python and ```."


def read_code(completion: str) -> tuple[str | None, str]:
    """Return the program, or None and a sentence on what is wrong with the form.

    It is the last Python block, else the last block without a language that compiles. Blocks of other languages are
    passed over, and so is a thinking block where the answer behind it has a program. A block that another one encloses
    by a longer fence counts where there is none outside.
    """
    answer = completion.rpartition(THINKING_END)[2]
    code, error = _read(read_blocks(answer))
    if code is None and answer != completion:
        # The answer may have none, or the program itself may write the mark that ends a thinking block.
        code, _ = _read(read_blocks(completion))
    return code, "" if code is not None else error


def _read(blocks: list[Block]) -> tuple[str | None, str]:
    python = [block for block in blocks if block.is_python]
    programs = [block.text for block in python if block.closed and block.text.strip()]
    if programs:
        return programs[-1], ""
    if python:
        if any(block.closed for block in python):
            return None, "Your answer's code block is empty."
        return None, f"Your answer's code block is not closed: {_FORM}"
    if (enclosed := _enclosed(blocks)) is not None:
        return enclosed, ""
    return _without_language(blocks)


def _enclosed(blocks: list[Block]) -> str | None:
    """Return the last Python block inside the blocks, which are of other languages."""
    for block in reversed(blocks):
        programs = [inner.text for inner in read_blocks(block.text) if inner.is_python and inner.text.strip()]
        if programs and block.closed:
            return programs[-1]
    return None


def _without_language(blocks: list[Block]) -> tuple[str | None, str]:
    unnamed = [block for block in blocks if not block.language]
    texts = [block.text for block in unnamed if block.closed and block.text.strip()]
    if texts:
        # Where none compiles, the last one is run all the same: its error tells more than a sentence on the form.
        return next((text for text in reversed(texts) if _compiles(text)), texts[-1]), ""
    if any(block.closed for block in unnamed):
        return None, "Your answer's code block is empty."
    if unnamed:
        return None, f"Your answer's code block is not closed: {_FORM}"
    if blocks:
        return None, f"Your answer holds no Python block, only {blocks[-1].language}: {_FORM}"
    return None, f"Your answer holds no code block: {_FORM}"


def _compiles(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return False
    return True
