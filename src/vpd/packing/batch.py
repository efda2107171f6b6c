"""Packs token sequences into one batch, and runs a network on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vpd.packing.layout import Known, PackedLayout
from vpd.packing.trie import Tokens, Trie, build_trie, common_prefixes, padded

PAD_TO_MULTIPLE_OF = 16
"""The number of tokens of a batch that shares prefixes is filled up to a multiple of this, from 256 tokens on. oneDNN
divides some other numbers of rows so badly that products take up to a quarter longer. GPUs also use blocks."""


@dataclass(frozen=True)
class PackedRow:
    """One sequence of a batch that shares no prefixes, as the model reads it.

    Attributes:
        input_ids: The token ids [1, L].
        position_ids: The position of each token [1, L].
        start: The packed index of its first token.
        stop: One past the packed index of its last token.
    """

    input_ids: Tensor
    position_ids: Tensor
    start: int
    stop: int


@dataclass(frozen=True)
class PackedBatch:
    """T packed tokens of several sequences, and the S completion tokens that are scored.

    The tokens are the distinct prefix tokens of every sequence without its last token, whose hidden state predicts
    nothing that is scored. A sequence without completion tokens adds none. A few tokens of no sequence, which no other
    token sees, may stand at the end: see :data:`PAD_TO_MULTIPLE_OF`.

    Attributes:
        input_ids: The token ids [T].
        position_ids: The position of each token in its sequences [T].
        targets: The ids of the completion tokens [S], sequence after sequence.
        predictor: The packed index of the token whose hidden state predicts each target [S].
        rollout: The rollout that each target belongs to [S], ascending; a rollout may have several sequences.
        layout: The trie and the masks that packed attention needs.
        rollout_count: How many rollouts were given.
        padded_token_count: How many tokens a padded batch would compute: sequences times the longest one's tokens.
        row_lengths: The lengths of the sequences, end to end, if prefixes are not shared; else None.
        as_teacher: Whether the teacher's adapter is on in the pass, where the model has one.
        padding: How many tokens at the end belong to no sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    predictor: Tensor
    rollout: Tensor
    layout: PackedLayout
    rollout_count: int
    padded_token_count: int
    row_lengths: tuple[int, ...] | None = None
    as_teacher: bool = False
    padding: int = 0

    @property
    def token_count(self) -> int:
        """How many tokens of sequences the model computes: T less the padding."""
        return self.input_ids.numel() - self.padding

    @property
    def is_empty(self) -> bool:
        """Whether nothing is scored, so that nothing is computed (T = S = 0). A model cannot run on such a batch."""
        return self.token_count == 0

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch with its tensors on the device. The layout, which makes its masks there, is shared."""
        names = ("input_ids", "position_ids", "targets", "predictor", "rollout")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def model_inputs(self) -> dict[str, Any]:
        """Return the keywords for one forward of a model with packed attention, whose hidden states are [1, T, H]."""
        # transformers takes any four-dimensional mask as ready-made, and makes none. Nothing reads it.
        stand_in = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.input_ids.device)
        return {
            "input_ids": self.input_ids[None],
            "position_ids": self.position_ids[None],
            "attention_mask": stand_in,
            "packed": self.layout,
            "use_cache": False,
        }

    def rows(self) -> Iterator[PackedRow]:
        """Yield the sequences one at a time, for a model that carries state across tokens.

        Raises:
            ValueError: The batch shares prefixes.
        """
        if self.row_lengths is None:
            raise ValueError(
                "This batch shares prefixes, so it has no rows. Make it with pack(..., share_prefixes=False)."
            )
        start = 0
        for length in self.row_lengths:
            stop = start + length
            yield PackedRow(self.input_ids[None, start:stop], self.position_ids[None, start:stop], start, stop)
            start = stop


def pack(
    sequences: Sequence[Tokens],
    completion_starts: Sequence[int],
    *,
    rollouts: Sequence[int] | None = None,
    share_prefixes: bool = True,
    keeps_keys: bool = False,
    conditioned_on: PackedBatch | None = None,
) -> PackedBatch:
    """Pack prompt-and-completion sequences into one batch, on the CPU.

    Args:
        sequences: The token ids of prompts with completions, which may belong to different groups.
        completion_starts: The index of each sequence's first completion token, from 1 to its length (no completion).
        rollouts: For each sequence the index of its rollout, ascending from 0: the turns of a conversation are several
            sequences of one rollout. By default every sequence is a rollout of its own.
        share_prefixes: Whether each distinct prefix is computed once. Without it the sequences lie end to end, for
            models that cannot be packed.
        keeps_keys: Whether a batch that is conditioned on this one will ask for its keys and values. They are kept
            without their gradient when the batch is run by the block kernel, until ``layout.forget()``.
        conditioned_on: A batch that keeps its keys and values. The prefixes that prompts have in common with its
            sequences are not computed again (KV reuse). The same network, with the same weights and without dropout,
            must have run that batch before it runs this one.

    Raises:
        ValueError: A completion starts before the second token or after the sequence's end, or a batch without
            shared prefixes is to keep its keys or is conditioned on another.
    """
    if not share_prefixes and (keeps_keys or conditioned_on is not None):
        raise ValueError(
            "A batch without shared prefixes can neither keep its keys and values nor be conditioned on another batch. "
            "Leave share_prefixes on."
        )
    owners = list(range(len(sequences))) if rollouts is None else list(rollouts)
    for i, (sequence, start) in enumerate(zip(sequences, completion_starts, strict=True)):
        if not 1 <= start <= len(sequence):
            raise ValueError(
                f"Sequence {i} has {len(sequence)} tokens and its completion starts at {start}; it must start between "
                "1 (a token needs one before it that predicts it) and the sequence's length."
            )
    scored = [i for i, start in enumerate(completion_starts) if start < len(sequences[i])]
    arrays = {i: np.asarray(sequences[i], dtype=np.int64) for i in scored}
    trie = build_trie([arrays[i][:-1] for i in scored], share_prefixes=share_prefixes)
    counts = [len(arrays[i]) - completion_starts[i] for i in scored]
    predictors = [path[completion_starts[i] - 1 :] for i, path in zip(scored, trie.paths, strict=True)]
    source = (
        np.full(len(trie.tokens), -1) if conditioned_on is None else _sources(trie, predictors, conditioned_on.layout)
    )
    padding = _padding(int((source < 0).sum())) if share_prefixes else 0
    trie, source = padded(trie, padding), np.append(source, np.full(padding, -1))
    known = None if conditioned_on is None else _known(source, conditioned_on.layout)
    computed = source < 0
    places = np.cumsum(computed) - 1
    predictor = _concatenate([places[path] for path in predictors])
    read = predictor.unique()
    return PackedBatch(
        input_ids=torch.from_numpy(trie.tokens[computed]),
        position_ids=torch.from_numpy(trie.depth[computed]),
        targets=_concatenate([arrays[i][completion_starts[i] :] for i in scored]),
        predictor=predictor,
        rollout=torch.from_numpy(np.repeat(np.asarray([owners[i] for i in scored], dtype=np.int64), counts)),
        layout=PackedLayout(trie, known, keeps_keys, scored=read if len(read) < computed.sum() else None),
        rollout_count=max(owners, default=-1) + 1,
        padded_token_count=len(sequences) * max((len(sequence) for sequence in sequences), default=0),
        row_lengths=None if share_prefixes else tuple(len(path) for path in trie.paths),
        padding=padding,
    )


def _padding(count: int) -> int:
    """How many tokens fill ``count`` up to the next multiple; 0 where they might add more than a sixteenth."""
    return -count % PAD_TO_MULTIPLE_OF if count >= PAD_TO_MULTIPLE_OF**2 else 0


def _sources(trie: Trie, predictors: list[np.ndarray], conditioned_on: PackedLayout) -> np.ndarray:
    """Find each token's packed index in the other layout [T]; -1 for tokens that this pass must compute.

    It must compute the tokens that the other layout lacks, and those whose hidden states are wanted.
    """
    source = np.full(len(trie.tokens), -1, dtype=np.int64)
    sequences = [conditioned_on.trie.tokens[path] for path in conditioned_on.trie.paths]
    for path, (other, length) in zip(
        trie.paths, common_prefixes([trie.tokens[path] for path in trie.paths], sequences), strict=True
    ):
        source[path[:length]] = conditioned_on.trie.paths[other][:length] if length else -1
    for predictor in predictors:
        # A token that is computed has descendants that are computed, too.
        source[predictor[0] : trie.subtree_end[predictor[0]]] = -1
    return source


def _known(source: np.ndarray, conditioned_on: PackedLayout) -> Known:
    """Divide the tokens into runs that the other layout has and runs that this pass computes."""
    mask = source >= 0
    rows = np.where(mask, source, np.cumsum(~mask) - 1)
    breaks = np.flatnonzero((np.diff(mask.astype(np.int8)) != 0) | (np.diff(rows) != 1)) + 1
    runs = [
        (bool(mask[start]), int(rows[start]), int(rows[stop - 1]) + 1)
        for start, stop in pairwise([0, *breaks.tolist(), len(rows)])
        if start < stop
    ]
    return Known(conditioned_on, mask, runs)


def hidden_states(backbone: nn.Module, batch: PackedBatch, layers: Sequence[int] = ()) -> Tensor:
    """Compute the last hidden states [T, H] of a backbone (a model without its head), in the batch's packed order.

    A batch that shares prefixes needs :func:`enable_packed_attention`; one that does not is run row by row.
    ``hidden_states(backbone, batch)[batch.predictor]`` are the S states that predict ``batch.targets``. A trimmed last
    layer (:mod:`vpd.policy.cpu.last_layer`) leaves the states of other tokens without meaning.

    Args:
        backbone: The model without its head.
        batch: The batch to run.
        layers: The layers, counted from 1, whose outputs follow the last states in the same row:
            [T, H + len(layers) * H]. The last layer's output is normalised, as transformers gives it.

    Raises:
        ValueError: The batch is empty, or there is no such layer.
    """
    if batch.is_empty:
        raise ValueError("The packed batch is empty: there is nothing to compute. Check `batch.is_empty` first.")
    if batch.row_lengths is None:
        return _states(backbone, layers, **batch.model_inputs())
    rows = [
        _states(backbone, layers, input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False)
        for row in batch.rows()
    ]
    return torch.cat(rows)


def _states(backbone: nn.Module, layers: Sequence[int], **inputs: Any) -> Tensor:
    if not layers:
        return backbone(**inputs).last_hidden_state[0]
    output = backbone(**inputs, output_hidden_states=True)
    count = len(output.hidden_states) - 1
    if wrong := [layer for layer in layers if not 1 <= layer <= count]:
        raise ValueError(f"The model has {count} layers, counted from 1; there is no layer {wrong[0]}.")
    return torch.cat([output.last_hidden_state[0], *(output.hidden_states[layer][0] for layer in layers)], dim=-1)


def _concatenate(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64))
