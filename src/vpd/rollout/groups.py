"""Sequences of a decoding batch that share their prompt, whose keys and values are held and read once for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHARED_NUMBERS = 2**18
"""Numbers of keys in a layer that a step must be spared for groups to be worth what gathers and joins them."""


class PromptGroups:
    """Which rows of a decoding batch have which prompt.

    Each prompt gets as many slots as the largest group has rows, so that the groups' queries are rows of one matrix a
    prompt. A slot without a row repeats another one, whose result is not read.

    Args:
        prompts: of each row, which prompt is its own; numbers from 0 on, all of which occur.
        mask: [prompts, P], what of the prompts' tokens is seen, 1, and what is padding, 0; None without padding.
        dtype: of the queries.
        device: of the queries.
        least: numbers of keys that they must save; :data:`SHARED_NUMBERS` by default.
    """

    def __init__(
        self,
        prompts: Sequence[int],
        mask: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        least: int | None = None,
    ) -> None:
        self._least = SHARED_NUMBERS if least is None else least
        self.count = max(prompts) + 1
        self.mask: Tensor | None = None
        if mask is not None:
            hidden = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(mask == 0, float("-inf"))
            self.mask = hidden[:, None, None]
        self._device = device
        self._place(list(prompts))

    def _place(self, prompts: list[int]) -> None:
        self.prompts = prompts
        groups: list[list[int]] = [[] for _ in range(self.count)]
        for row, prompt in enumerate(prompts):
            groups[prompt].append(row)
        self._size = max(map(len, groups))
        slots = [row for group in groups for row in group + [0] * (self._size - len(group))]
        self._slots = self._places = None
        if slots != list(range(len(prompts))):
            places = [prompt * self._size + groups[prompt].index(row) for row, prompt in enumerate(prompts)]
            self._slots = torch.tensor(slots, device=self._device)
            self._places = torch.tensor(places, device=self._device)

    def keep(self, order: Sequence[int]) -> None:
        """Row i is now the row that was ``order[i]``; the others have left."""
        self._place([self.prompts[row] for row in order])

    def saves(self, numbers: int) -> bool:
        """Whether it is worth while, where a prompt has that many numbers of keys."""
        return (len(self.prompts) - self.count) * numbers >= self._least

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [B, heads, R, ...] by prompt: [prompts, heads, slots * R, ...]."""
        slots = rows if self._slots is None else rows[self._slots]
        return slots.unflatten(0, (self.count, self._size)).transpose(1, 2).flatten(2, 3)

    def scatter(self, slots: Tensor) -> Tensor:
        """What :meth:`gather` gave, or something of like shape, as rows again."""
        rows = slots.unflatten(2, (self._size, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self._places is None else rows[self._places]
