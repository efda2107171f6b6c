"""Key-value caches for the decode loop: rows that share storage, grow rarely, and leave cheaply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from vpd.rollout.groups import PromptGroups

MIN_GROWTH = 64
"""Tokens; below it the copy on growth would come too often to be worth the memory saved."""


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one attention layer, written in place into storage that is larger than what is filled.

    Sliding-window layers use it too: all positions are kept and the attention mask, which transformers builds from
    the positions, hides those outside the window.

    Rows may also :meth:`share` prompts: then the storage holds what came after the prompts, and attention, which finds
    the layer by :func:`layer_of`, reads the prompts' keys and values from ``prompts``.

    Args:
        max_length: tokens that a sequence will ever have; storage never grows beyond it.

    Attributes:
        length: tokens that a row has, those of a shared prompt included.
        groups: which row has which prompt; None where rows store theirs themselves.
        prompts: keys and values of the shared prompts, [prompts, heads, P, width] each; None likewise.
    """

    is_sliding = False

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length
        self.rows = 0
        self.length = 0
        self.groups: PromptGroups | None = None
        self.prompts: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take over the prefill's own tensors: room to grow is allocated when the rows are expanded or extended."""
        self.keys, self.values = key_states, value_states
        self.rows, _, self.length, _ = key_states.shape
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[rows, heads, new, width]``; returns views of all that is stored, new tokens included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return self._signed(key_states.view_as(key_states)), self._signed(value_states.view_as(value_states))
        assert self.keys is not None
        assert self.values is not None
        start = self._stored
        self.length += key_states.shape[-2]
        if self._stored > self.keys.shape[-2]:
            self.keys = self._enlarged(self.keys, start)
            self.values = self._enlarged(self.values, start)
        keys = self.keys[: self.rows, :, : self._stored]
        values = self.values[: self.rows, :, : self._stored]
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        return self._signed(keys), self._signed(values)

    @property
    def _stored(self) -> int:
        """Tokens that are in the storage."""
        return self.length - (0 if self.prompts is None else self.prompts[0].shape[-2])

    def _signed(self, states: torch.Tensor) -> torch.Tensor:
        states.cache_layer = self  # pyright: ignore[reportAttributeAccessIssue]
        return states

    def _enlarged(self, storage: torch.Tensor, filled: int) -> torch.Tensor:
        larger = self._allocate(storage, self.rows)
        larger[:, :, :filled] = storage[: self.rows, :, :filled]
        return larger

    def _allocate(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        shared = self.length - self._stored
        capacity = min(self.max_length - shared, self._stored + max(MIN_GROWTH, self._stored // 2))
        capacity = max(self._stored, capacity)
        return like.new_empty(rows, like.shape[1], capacity, like.shape[3])

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def expand(self, rows: torch.Tensor) -> None:
        """Make row i a copy of row ``rows[i]``, with room to grow."""
        if self.keys is None or self.values is None:
            return
        for name, storage in (("keys", self.keys), ("values", self.values)):
            expanded = self._allocate(storage, len(rows))
            # Straight into the new storage: a gathered copy in between would double the peak.
            torch.index_select(storage[:, :, : self.length], 0, rows, out=expanded[:, :, : self.length])
            setattr(self, name, expanded)
        self.rows = len(rows)

    def share(self, groups: PromptGroups) -> None:
        """Let rows have what is stored as their prompts, as ``groups`` says, and store what comes after them."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = (states[:, :, : self.length].contiguous() for states in (self.keys, self.values))
        self.prompts, self.groups, self.rows = (keys, values), groups, len(groups.prompts)
        self.keys, self.values = self._allocate(keys, self.rows), self._allocate(values, self.rows)

    def unshare(self) -> None:
        """Let each row store its prompt itself."""
        assert self.groups is not None
        assert self.prompts is not None
        assert self.keys is not None
        assert self.values is not None
        shared, stored = self.length - self._stored, self._stored
        rows = torch.tensor(self.groups.prompts, device=self.keys.device)
        pairs = zip(self.prompts, (self.keys, self.values), strict=True)
        self.groups = self.prompts = None
        self.keys, self.values = (self._joined(prompts, rows, own[:, :, :stored], shared) for prompts, own in pairs)

    def _joined(self, prompts: torch.Tensor, rows: torch.Tensor, own: torch.Tensor, shared: int) -> torch.Tensor:
        storage = self._allocate(prompts, self.rows)
        torch.index_select(prompts, 0, rows, out=storage[:, :, :shared])
        storage[:, :, shared : self.length] = own[: self.rows]
        return storage

    def drop(self, count: int, holes: torch.Tensor, fillers: torch.Tensor) -> None:
        """Keep ``count`` rows: copy rows ``fillers`` into ``holes``, and leave those from ``count`` on unused."""
        if self.keys is None or self.values is None:
            return
        if len(holes):
            for storage in (self.keys, self.values):
                filled = storage[:, :, : self._stored]
                filled[holes] = filled[fillers]
        self.rows = count


def layer_of(keys: torch.Tensor, values: torch.Tensor) -> PreallocatedLayer | None:
    """The layer whose :meth:`PreallocatedLayer.update` has returned both; None where either is something else."""
    layer = getattr(keys, "cache_layer", None)
    return layer if layer is getattr(values, "cache_layer", None) else None


class PreallocatedCache(Cache):
    """A cache whose attention layers are :class:`PreallocatedLayer`; other layers hold nothing.

    Args:
        layers: of the model.
        places_matter: whether attention depends on tokens' places in the cache, not on their positions alone: then rows
            cannot share prompts, whose tokens have no place among theirs.

    Attributes:
        attention_layers: those of ``layers`` that hold something.
    """

    def __init__(self, layers: Sequence[PreallocatedLayer | DummyLayer], *, places_matter: bool):
        super().__init__(layers=list(layers))
        self.places_matter = places_matter
        self.attention_layers = [layer for layer in layers if isinstance(layer, PreallocatedLayer)]
        self._groups: PromptGroups | None = None
        self._prompt_numbers = 0

    @property
    def is_shared(self) -> bool:
        """Whether rows share their prompts; attention then takes no mask."""
        return self._groups is not None

    def share(self, prompts: Sequence[int], mask: torch.Tensor | None, least: int | None = None) -> bool:
        """Let rows share what is stored, their prompts, where that is worth while.

        Only for attention that knows of it (:class:`vpd.rollout.prefill.Prefill`), and takes positions from nowhere but
        the keys.

        Args:
            prompts: of each row to come, which of the stored ones is its own.
            mask: see :class:`PromptGroups`.
            least: likewise.

        Returns:
            Whether they do. If not, nothing has changed.
        """
        keys = self.attention_layers[0].keys
        assert keys is not None
        groups = PromptGroups(prompts, mask, keys.dtype, keys.device, least)
        self._prompt_numbers = keys.shape[1] * self.attention_layers[0].length * keys.shape[3]
        if not groups.saves(self._prompt_numbers):
            return False
        for layer in self.attention_layers:
            layer.share(groups)
        self._groups = groups
        return True

    def expand(self, rows: torch.Tensor) -> None:
        """Make row i of every layer a copy of row ``rows[i]``; the number of rows may change."""
        for layer in self.attention_layers:
            layer.expand(rows)

    def drop(self, kept: list[int], device: torch.device) -> list[int]:
        """Keep the given rows (ascending) and return their new order: entry i is the row that is now row i.

        The last rows move into the holes, so that a row that leaves costs the copy of one row, not of the batch.
        """
        order, holes, fillers = compaction(kept)
        hole_rows = torch.tensor(holes, dtype=torch.long, device=device)
        filler_rows = torch.tensor(fillers, dtype=torch.long, device=device)
        for layer in self.attention_layers:
            layer.drop(len(kept), hole_rows, filler_rows)
        if self._groups is not None:
            self._groups.keep(order)
            if not self._groups.saves(self._prompt_numbers):
                self._groups = None
                for layer in self.attention_layers:
                    layer.unshare()
        return order


class StatefulCache(DynamicCache):
    """transformers' own cache, for models with layers that carry a state from token to token."""

    is_shared = False

    def expand(self, rows: torch.Tensor) -> None:
        """Make row i of every layer a copy of row ``rows[i]``; the number of rows may change."""
        self.reorder_cache(rows)  # pyright: ignore[reportArgumentType]

    def drop(self, kept: list[int], device: torch.device) -> list[int]:
        """Keep the given rows and return their new order: entry i is the row that is now row i."""
        self.expand(torch.tensor(kept, dtype=torch.long, device=device))
        return kept


def compaction(kept: list[int]) -> tuple[list[int], list[int], list[int]]:
    """The fewest moves that bring the ``kept`` rows (ascending) to the front.

    Returns:
        the order (entry i is the row that comes to place i), the places that get another row, and those rows.
    """
    count = len(kept)
    fillers = [row for row in kept if row >= count]
    in_place = set(kept)
    holes = [place for place in range(count) if place not in in_place]
    order = list(range(count))
    for place, row in zip(holes, fillers, strict=True):
        order[place] = row
    return order, holes, fillers


def make_cache(config: PreTrainedConfig, max_length: int) -> PreallocatedCache | StatefulCache:
    """An empty cache for a model of this config, for sequences of at most ``max_length`` tokens, padding included.

    A :class:`StatefulCache` means that rows must not be padded: their state would take the padding in.
    """
    dynamic = StatefulCache(config=config)
    # Exact types: their subclasses hold more than keys and values.
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in dynamic.layers):
        return dynamic
    return PreallocatedCache(
        [layer if isinstance(layer, DummyLayer) else PreallocatedLayer(max_length) for layer in dynamic.layers],
        # Windows are counted in places, as are the distances of ALiBi (MPT) and GPT-Neo's local attention; rotary
        # embeddings put the position into the key.
        places_matter=any(isinstance(layer, DynamicSlidingWindowLayer) for layer in dynamic.layers)
        or not getattr(config, "rope_parameters", None),
    )
