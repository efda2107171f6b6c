"""Recognises errors of missing memory, and halves what a pass takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error, of Python or of torch on any device, says that there is no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def halved(parts: Sequence[list[T]]) -> list[list[T]]:
    """Cut each part into two, of which one may be empty."""
    return [half for part in parts for half in (part[: (len(part) + 1) // 2], part[(len(part) + 1) // 2 :])]


def joined(values: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Put the numbers of the two halves of each part together, one after the other."""
    pairs = zip(values[::2], values[1::2], strict=True)
    return [first | {name: torch.cat([first[name], second[name]]) for name in second} for first, second in pairs]
