"""Tiles ask for exactly the right pairs, once each, and their batches cost least."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import branching_trie, few, sequence_lists, tiling_of, true_pairs, windows

from vpd.packing import pack
from vpd.packing.kernels import blocks, products, tiles
from vpd.packing.kernels.blocks import Block
from vpd.packing.kernels.tiles import Tile, batch_tiles, cut_into_tiles
from vpd.packing.layout import PackedLayout
from vpd.packing.trie import build_trie

HEADS = 6


@few
@given(sequence_lists, sequence_lists, windows, st.sampled_from([(1, 1), (8, 512)]), st.integers(1, 2000))
def test_tiles_ask_for_exactly_the_right_pairs_of_the_tokens_that_are_not_known(known, sequences, window, costs, cap):
    first = pack([[*tokens, 9] for tokens in known], [len(tokens) + 1 for tokens in known], keeps_keys=True)
    sequences = [[*tokens, 9, 9] for tokens in sequences]
    packed = pack(sequences, [len(tokens) - 1 for tokens in sequences], conditioned_on=first).layout
    heads, key_heads = 4, 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "KEY_COST", costs[0])
        patch.setattr(tiles, "TILE_COST", costs[1])
        patch.setattr(tiles, "BATCH_COST", 50)
        patch.setattr(tiles, "BATCH_SCORES", cap)
        patch.setattr(tiles, "TILE_SCORES", cap)
        # One segment in several blocks.
        patch.setattr(blocks, "CHAIN_ROWS", 4)
        tiling = packed.prepared(products.Prepared).tiling(window, heads, key_heads)

    seen = np.zeros((heads, packed.token_count, len(packed.trie.tokens)), dtype=int)
    for batch in tiling.batches:
        count, queries, keys = batch.shape
        hidden = torch.zeros(count, queries, keys)
        hidden[..., keys - batch.mask.shape[-1] :] += batch.mask[:, 0]
        if batch.key_padding is not None:
            hidden[..., : batch.key_padding.shape[-1]] += batch.key_padding[:, 0]
        is_query = torch.ones(count * heads * queries, dtype=torch.bool)
        if batch.query_padding is not None:
            is_query[batch.query_padding] = False
        query_rows, key_rows = batch.query_rows.view(count, heads, queries), batch.key_rows.view(count, key_heads, keys)
        is_query = is_query.view(count, heads, queries)
        for i, head in itertools.product(range(count), range(heads)):
            kept = is_query[i, head]
            assert (query_rows[i, head][kept] % heads == head).all()
            assert (is_query[i] == kept).all()
            pairs = (hidden[i] == 0).numpy()[kept.numpy()]
            key_head = head // (heads // key_heads)
            assert (key_rows[i, key_head] % key_heads == key_head)[pairs.any(0)].all()
            tokens = (query_rows[i, head][kept] // heads).numpy()
            np.add.at(seen[head], (tokens[:, None], (key_rows[i, key_head] // key_heads).numpy()[None]), pairs)
    expected = true_pairs(packed.trie, window)
    if packed._known is not None:
        expected = expected[~packed._known.mask]
    np.testing.assert_array_equal(seen, np.broadcast_to(expected, seen.shape))


@pytest.mark.parametrize("window", [None, 25])
@pytest.mark.parametrize("largest", [1, 300, 4000, 2**20])
@pytest.mark.usefixtures("fine")
def test_tiles_hold_every_query_once_and_their_batches_at_most_so_many_scores(window, largest, monkeypatch):
    """One token's queries are not divided. No tile has keys after its last query."""
    monkeypatch.setattr(tiles, "BATCH_SCORES", largest)
    monkeypatch.setattr(tiles, "TILE_SCORES", largest)
    trie = branching_trie()
    cut, tiling = tiling_of(trie, window)
    assert cut[0].start == 0
    assert cut[-1].stop == len(trie.tokens)
    assert all(left.stop == right.start for left, right in itertools.pairwise(cut))
    for tile in cut:
        assert tile.query_count == 1 or 6 * tile.query_count * len(tile.keys) <= largest
        np.testing.assert_array_equal(tile.keys[-tile.query_count :], np.arange(tile.start, tile.stop))
    for count, queries, keys in (batch.shape for batch in tiling.batches):
        assert count == 1 or 6 * count * queries * keys <= largest
        assert keys % 16 == 0


def test_a_long_chain_neither_has_a_mask_nor_gathers_keys_of_its_length_squared():
    """With a window, masks are shared, and keys before it are not gathered."""
    length = 3000
    trie = build_trie([[0] * 500 + [1 + i] * length for i in range(4)])
    for window in (None, 1000):
        cut, tiling = tiling_of(trie, window)
        masks = {batch.mask.data_ptr(): batch.mask.numel() for batch in tiling.batches}
        assert sum(masks.values()) < len(trie.tokens) * length / 10
        for part in tiling.sums:
            rows = sum(len(batch.key_rows) for batch in part.batches)
            assert len(part.batches) == 1 or rows <= tiles.SUM_ROWS
        assert window is None or max(len(tile.keys) - tile.query_count for tile in cut) <= window - 1


def test_a_branch_asks_for_its_own_ancestors_alone():
    """Where branches are long enough; few scores are made that nobody may see."""
    trie = branching_trie(prompt=250, branches=8, branch=70)
    _, tiling = tiling_of(trie, None)
    made = sum(count * queries * keys for count, queries, keys in (batch.shape for batch in tiling.batches))
    assert 1 < made / (trie.depth + 1).sum() < 1.2


@pytest.mark.parametrize("before", [0, 26, 250])
@pytest.mark.parametrize("queries", [40, 344, 512])
def test_blocks_are_cut_where_scores_cost_more_than_gathered_keys(queries, before):
    trie = build_trie([list(range(before + queries)), list(range(before))])
    block = Block(before, before + queries, ((0, before + queries),), is_chain=True, is_causal=False)

    def cost(sizes):
        stops = itertools.accumulate(sizes, initial=before)
        next(stops)
        return sum((size + tiles.KEY_COST) * stop for size, stop in zip(sizes, stops, strict=True))

    cut = cut_into_tiles([block], trie, None, 9)
    sizes = [tile.query_count for tile in cut]
    assert max(sizes) - min(sizes) <= 1
    best = min(cost([len(part) for part in np.array_split(range(queries), n)]) for n in range(1, queries + 1))
    assert cost(sizes) <= 1.02 * best


@few
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=7), st.sampled_from([1, 100, 2000])
)
def test_no_cheaper_batches_of_tiles_in_order_of_their_size(sizes, batch_cost):
    cut = []
    for queries, before in sizes:
        start = cut[-1].stop if cut else 0
        cut.append(Tile(start, start + queries, np.arange(before + queries), None))

    def cost(shape):
        count, queries, keys = shape
        return count * keys * (queries + tiles.KEY_COST) + batch_cost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "BATCH_COST", batch_cost)
        made = batch_tiles(cut, 200, None, heads=1, key_heads=1)
    assert sum(batch.shape[0] for batch in made.batches) == len(cut)
    ordered = sorted(cut, key=lambda tile: (len(tile.keys), tile.query_count))
    for cuts in itertools.product((False, True), repeat=len(cut) - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(cut)]
        parts = [ordered[start:stop] for start, stop in itertools.pairwise(bounds)]
        shapes = [
            (len(part), max(x.query_count for x in part), 16 * -(-max(len(x.keys) for x in part) // 16))
            for part in parts
        ]
        assert sum(cost(batch.shape) for batch in made.batches) <= sum(map(cost, shapes))


def test_layers_with_the_same_view_share_tiles():
    packed = PackedLayout(branching_trie()).prepared(products.Prepared)
    assert packed.tiling(None, 6, 3) is packed.tiling(10**6, 6, 3)
    assert packed.tiling(None, 6, 3) is not packed.tiling(25, 6, 3)
    assert packed.tiling(None, 6, 3) is not packed.tiling(None, 6, 2)
