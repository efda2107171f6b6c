"""What all attention kernels share of a packed batch: its trie, and the keys and values that it reuses or keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from vpd.packing.trie import Trie

T = TypeVar("T")


@dataclass(frozen=True)
class Known:
    """Tokens of a trie whose keys and values come from another pass.

    Attributes:
        source: The layout of that pass.
        mask: Which tokens these are, [T] bool; with a token all its ancestors are among them.
        runs: All tokens in order, as runs. Each run has whether it is known, and where it starts and stops: among the
            source's tokens if it is known, else among the tokens that this pass computes.
    """

    source: PackedLayout
    mask: np.ndarray
    runs: list[tuple[bool, int, int]]

    def put_together(self, known: Tensor, computed: Tensor) -> Tensor:
        """The keys or values [key heads, T, D] of all tokens, from the source's and those that this pass computed."""
        known = known.to(computed.dtype)
        # The result is laid out token by token, as attention's inputs are.
        by_token = {True: known.transpose(0, 1), False: computed.transpose(0, 1)}
        return torch.cat([by_token[is_known][start:stop] for is_known, start, stop in self.runs]).transpose(0, 1)


@dataclass(frozen=True)
class Segments:
    """Which tokens a batch has and which of them it computes: all that a kernel needs to prepare its work.

    Attributes:
        trie: The tokens, known ones included.
        known: Which of them another pass has computed, [T] bool; None for none.
    """

    trie: Trie
    known: np.ndarray | None

    def effective(self, window: int | None) -> int | None:
        """The sliding window, in positions; None for one that no sequence outgrows."""
        return None if window is None or window > int(self.trie.depth.max(initial=-1)) else window


class PackedLayout:
    """The segments of one packed batch, handed through the model to its attention layers as the keyword ``packed``.

    Args:
        trie: The tokens, known ones included.
        known: The tokens whose keys and values another pass has computed; None for none.
        keeps: Whether this pass keeps its keys and values, for other passes to reuse.
        scored: The tokens whose last hidden states are read, [n] of the T tokens, ascending; None for all.
    """

    def __init__(
        self, trie: Trie, known: Known | None = None, keeps: bool = False, scored: Tensor | None = None
    ) -> None:
        self.trie = trie
        self.scored = scored
        self._known = known
        self._kept: dict[nn.Module, list[tuple[Tensor, Tensor]]] | None = {} if keeps else None
        self._taken: Counter[nn.Module] = Counter()
        self._segments = Segments(trie, None if known is None else known.mask)
        self._prepared: dict[Callable[[Segments], Any], Any] = {}

    @property
    def token_count(self) -> int:
        """How many packed tokens are computed, T; those that fill the batch up are included."""
        return len(self.trie.tokens) - (0 if self._known is None else int(self._known.mask.sum()))

    @property
    def known(self) -> np.ndarray | None:
        """Which tokens of the trie another pass has computed, [T] bool; None for none."""
        return self._segments.known

    def prepared(self, kernel: Callable[[Segments], T]) -> T:
        """What a kernel prepares for this batch, made of its segments at first use and kept.

        All layers, and the second pass of gradient checkpointing, share it. It must not hold the layout: in a cycle the
        workspaces of past batches would stay until Python looks for cycles.
        """
        if kernel not in self._prepared:
            self._prepared[kernel] = kernel(self._segments)
        return cast(T, self._prepared[kernel])

    def with_known(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [key heads, T, D] of one layer, with those of the known tokens in their places.

        Raises:
            ValueError: The pass that computed these has not kept any.
        """
        if self._known is None:
            return key, value
        kept = (self._known.source._kept or {}).get(layer)
        if not kept:
            raise ValueError(
                "The batch whose keys and values are to be reused has none: it was packed without keeping them, has "
                "not been run, or was told to forget."
            )
        # A layer may run several times in a pass.
        keys, values = kept[self._taken[layer] % len(kept)]
        self._taken[layer] += 1
        return self._known.put_together(keys, key), self._known.put_together(values, value)

    def keep(self, layer: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep a layer's keys and values [key heads, T, D], without their gradient, if they may be reused."""
        if self._kept is not None:
            self._kept.setdefault(layer, []).append((key.detach(), value.detach()))

    def give_away(self) -> Iterator[tuple[nn.Module, list[tuple[Tensor, Tensor]]]]:
        """Each layer with its kept keys and values [key heads, T, D], a pair for each time it ran.

        What is given is no longer kept.
        """
        while self._kept:
            yield self._kept.popitem()

    def forget(self) -> None:
        """Keep no keys and values from now on, so that the second pass of gradient checkpointing keeps none either."""
        self._kept = None
