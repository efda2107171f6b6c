"""The blocks cover every query once, attend to exactly the right pairs, and stay under the cap."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import few, sequence_lists, true_pairs, windows

from vpd.packing import pack
from vpd.packing.kernels import blocks, sdpa
from vpd.packing.kernels.blocks import Block, partition
from vpd.packing.layout import PackedLayout
from vpd.packing.trie import build_trie


def attended_pairs(packed: PackedLayout, window: int | None) -> np.ndarray:
    """[T, T] bool by what the blocks and their masks let through."""
    attended = np.zeros((len(packed.trie.tokens),) * 2, dtype=bool)
    prepared = packed.prepared(sdpa.Prepared)
    masks = prepared.masks(window, 1, torch.float32, torch.device("cpu"))
    for block, mask in zip(prepared.plan(window).blocks, masks, strict=True):
        keys = np.concatenate([np.arange(start, stop) for start, stop in block.key_ranges])
        allowed = np.tri(len(keys), dtype=bool) if mask is None else (mask == 0).numpy()
        attended[block.start : block.stop, keys] |= allowed
    return attended


@few
@given(sequence_lists, windows, st.booleans(), st.sampled_from([(0, 0), (0, 8), (96, 1024)]))
def test_blocks_attend_to_exactly_the_right_pairs(sequences, window, share_prefixes, costs):
    trie = build_trie(sequences, share_prefixes=share_prefixes)
    with pytest.MonkeyPatch.context() as patch:
        # Cheap calls divide the batch finely, dear ones merge it, and short chains make several blocks of a segment.
        patch.setattr(blocks, "KEY_COST", costs[0])
        patch.setattr(blocks, "CALL_COST", costs[1])
        patch.setattr(blocks, "CHAIN_ROWS", 4)
        packed = PackedLayout(trie)
        np.testing.assert_array_equal(attended_pairs(packed, window), true_pairs(trie, window))


@few
@given(sequence_lists, sequence_lists, windows, st.sampled_from([(0, 0), (0, 8), (96, 1024)]))
def test_blocks_ask_for_the_tokens_alone_that_are_not_known(known, sequences, window, costs):
    first = pack([[*tokens, 9] for tokens in known], [len(tokens) + 1 for tokens in known], keeps_keys=True)
    sequences = [[*tokens, 9, 9] for tokens in sequences]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "KEY_COST", costs[0])
        patch.setattr(blocks, "CALL_COST", costs[1])
        patch.setattr(blocks, "CHAIN_ROWS", 4)
        packed = pack(sequences, [len(tokens) - 1 for tokens in sequences], conditioned_on=first).layout
        attended = attended_pairs(packed, window)
    expected = true_pairs(packed.trie, window)
    computed = attended.any(1)
    assert computed.sum() == packed.token_count
    np.testing.assert_array_equal(attended[computed], expected[computed])


@few
@given(sequence_lists, windows, st.integers(12, 60))
def test_no_block_exceeds_the_cap(sequences, window, max_elements):
    cut = partition(build_trie(sequences), window, max_elements)
    assert all(block.is_causal or block.query_count * block.key_count <= max_elements for block in cut)
    assert [block.start for block in cut[1:]] == [block.stop for block in cut[:-1]]


@few
@given(sequence_lists, windows)
def test_no_cheaper_cut_at_the_same_places(sequences, window):
    trie = build_trie(sequences)
    places = [0, *trie.segment_starts[1:].tolist()]
    chosen = sum(cost(block) for block in partition(trie, window))
    # Every subset of the inner places, as long as there are few enough.
    inner = places[1:-1][:6]
    for chosen_places in range(2 ** len(inner)):
        bounds = [0, *(place for i, place in enumerate(inner) if chosen_places >> i & 1), places[-1]]
        pairs = pairwise(bounds)
        other = sum(cost(blocks._block(trie, start, stop, window)) for start, stop in pairs if start < stop)
        assert chosen <= other


def cost(block: Block) -> float:
    pairs = block.query_count * block.key_count / (2 if block.is_causal else 1)
    return pairs + blocks.KEY_COST * block.key_count + blocks.CALL_COST


def test_a_long_batch_has_no_mask_of_its_length_squared(monkeypatch):
    prompt, length = [1] * 500, 6000
    packed = PackedLayout(build_trie([prompt + [2 + i] * length for i in range(8)]))
    sizes = []
    monkeypatch.setattr(sdpa, "_additive", lambda allowed, rows, dtype, device: sizes.append(allowed.size) or _empty())
    packed.prepared(sdpa.Prepared).masks(None, 1, torch.float32, torch.device("cpu"))
    longest = len(prompt) + length
    assert sum(sizes) <= 2 * blocks.CHAIN_ROWS * longest < packed.token_count * longest / 10


def _empty() -> torch.Tensor:
    return torch.empty(0, 0)


def test_layers_with_the_same_view_share_masks():
    packed = PackedLayout(build_trie([[1, 2, 3], [1, 2, 4]]))
    prepared = packed.prepared(sdpa.Prepared)
    assert packed.prepared(sdpa.Prepared) is prepared
    arguments = (1, torch.float32, torch.device("cpu"))
    assert prepared.masks(None, *arguments) is prepared.masks(None, *arguments)
    assert prepared.plan(None) is prepared.plan(3)
    assert prepared.plan(None) is not prepared.plan(2)
