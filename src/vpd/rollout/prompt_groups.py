"""Prefix sharing while decoding: the rows that share a prompt, whose keys and values are held and read once for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MINIMUM_SAVING = 2**18
"""How many numbers of keys in a layer a step must be spared before sharing is worth the gathering and joining."""


class PromptGroups:
    """Tells which rows of a decoding batch share which prompt.

    Each prompt gets as many slots as the largest group has rows, so that the queries of a group are the rows of one
    matrix. A slot without a row repeats another row, whose result is not read.

    Args:
        prompt_of_row: For each row, the number of its prompt; the numbers begin at 0, and all of them occur.
        mask: Which tokens of the prompts are seen, [prompts, P], 1 for tokens and 0 for padding; None without padding.
        dtype: The dtype of the queries.
        device: The device of the queries.
        minimum_saving: How many numbers of keys sharing must save; :data:`MINIMUM_SAVING` by default.

    Attributes:
        mask: What attention adds to the scores of the prompts' tokens, [prompts, 1, 1, P]; None without padding.
    """

    def __init__(
        self,
        prompt_of_row: Sequence[int],
        mask: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        minimum_saving: int | None = None,
    ) -> None:
        self._minimum_saving = MINIMUM_SAVING if minimum_saving is None else minimum_saving
        self._prompt_count = max(prompt_of_row) + 1
        self.mask: Tensor | None = None
        if mask is not None:
            hidden = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(mask == 0, float("-inf"))
            self.mask = hidden[:, None, None]
        self._device = device
        self._assign_slots(list(prompt_of_row))

    def _assign_slots(self, prompt_of_row: list[int]) -> None:
        self.prompt_of_row = prompt_of_row
        groups: list[list[int]] = [[] for _ in range(self._prompt_count)]
        for row, prompt in enumerate(prompt_of_row):
            groups[prompt].append(row)
        self._group_size = max(map(len, groups))
        row_of_slot = [row for group in groups for row in group + [0] * (self._group_size - len(group))]
        self._row_of_slot = self._slot_of_row = None
        if row_of_slot != list(range(len(prompt_of_row))):
            slot_of_row = [
                prompt * self._group_size + groups[prompt].index(row) for row, prompt in enumerate(prompt_of_row)
            ]
            self._row_of_slot = torch.tensor(row_of_slot, device=self._device)
            self._slot_of_row = torch.tensor(slot_of_row, device=self._device)

    def keep_rows(self, order: Sequence[int]) -> None:
        """Make row i the row that was ``order[i]``; the other rows leave."""
        self._assign_slots([self.prompt_of_row[row] for row in order])

    def save_enough(self, key_numbers: int) -> bool:
        """Whether sharing is worth its cost, where the keys of a prompt are so many numbers."""
        return (len(self.prompt_of_row) - self._prompt_count) * key_numbers >= self._minimum_saving

    def gather(self, rows: Tensor) -> Tensor:
        """Sort the rows [B, heads, R, ...] by prompt: [prompts, heads, slots * R, ...]."""
        slots = rows if self._row_of_slot is None else rows[self._row_of_slot]
        return slots.unflatten(0, (self._prompt_count, self._group_size)).transpose(1, 2).flatten(2, 3)

    def scatter(self, slots: Tensor) -> Tensor:
        """Turn what :meth:`gather` gave, or a tensor of like shape, back into rows [B, heads, R, ...]."""
        rows = slots.unflatten(2, (self._group_size, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self._slot_of_row is None else rows[self._slot_of_row]
