"""Attention by products in bfloat16 against the formula in float64, and what takes it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import few, sequence_lists, true_pairs, windows
from tiny_models import attention_configs, build, grouped_sequences

from vpd.packing import attention, blocks, enable_packed_attention, hidden_states, pack, products
from vpd.packing.blocks import Block, allowed_pairs, partition
from vpd.packing.layout import PackedLayout
from vpd.packing.products import Workspace, batch_tiles, can_multiply, cut_into_tiles, make_tiling
from vpd.packing.trie import build_trie
from vpd.processor import multiplies_bfloat16

CONFIGS = attention_configs()
HEADS, KEY_HEADS = 6, 3

pytestmark = pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor has no products in bfloat16")


def _trie(prompt=40, branches=5, branch=30):
    """Two prompts with branches of their own, which share a beginning."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 1000, prompt).tolist()
    prompts = [first, [*first[: prompt // 2], *rng.integers(0, 1000, prompt).tolist()]]
    return build_trie([[*start, *rng.integers(0, 1000, branch).tolist()] for start in prompts for _ in range(branches)])


def _inputs(tokens, width, value_width, loudness, common=0.0):
    """Queries, keys, values and the output's gradient; scores are around ``loudness``, and the values and the output's
    gradient have ``common`` and 1 in common, which cancels in the gradient of the scores."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((HEADS, width), (KEY_HEADS, width), (KEY_HEADS, value_width), (HEADS, value_width))
    query, key, value, grad = (torch.randn(tokens, *shape, generator=generator) for shape in shapes)
    return [x.bfloat16() for x in (query * loudness, key, value + common, grad + (common > 0))]


def _formula(query, key, value, trie, window, scaling):
    tokens = np.arange(len(trie.tokens))
    allowed = torch.from_numpy(allowed_pairs(trie, tokens, tokens, window))
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), value)


def _tiling(trie, window):
    cut = partition(trie, window, costs=(products.KEY_COST, products.TILE_COST))
    return cut_into_tiles(cut, trie, window, HEADS), make_tiling(trie, window, HEADS, KEY_HEADS)


def _distance(left, right):
    right = right.detach()
    return float((left.detach().double() - right).norm() / right.norm())


@pytest.fixture
def fine(monkeypatch):
    """Tiles of a few queries, so that these small batches have many of them, in batches of several."""
    for name, value in (("KEY_COST", 1), ("TILE_COST", 1), ("BATCH_COST", 200)):
        monkeypatch.setattr(products, name, value)


class _Spoilt(Workspace):
    """Hands out memory in which nothing can be read before it is written."""

    def take(self, name, shape, dtype):
        return super().take(name, shape, dtype).fill_(float("nan"))


@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize("window", [None, 25])
@pytest.mark.parametrize(("largest", "rows"), [(300, 2**18), (4000, 2**18), (4000, 1000), (2**20, 2**18)])
@pytest.mark.parametrize(("width", "value_width", "common"), [(64, 64, 0.0), (40, 16, 0.0), (64, 64, 10.0)])
def test_outputs_and_gradients_are_those_of_the_formula(window, largest, rows, width, value_width, common, monkeypatch):
    """Within the rounding of bfloat16 (8 bits), with scores so large that rounding them would show."""
    monkeypatch.setattr(products, "BATCH_SCORES", largest)
    monkeypatch.setattr(products, "TILE_SCORES", largest)
    monkeypatch.setattr(products, "SUM_ROWS", rows)
    trie = _trie()
    tiles, tiling = _tiling(trie, window)
    # 300 scores are those of one tile.
    assert (len(tiles) > len(tiling.batches)) == (largest > 300)
    assert any(batch.query_padding is not None for batch in tiling.batches) == (largest > 300)
    assert any(batch.key_padding is not None for batch in tiling.batches)
    assert (len(tiling.sums) > 2) == (rows == 1000)
    *inputs, grad = _inputs(len(trie.tokens), width, value_width, loudness=8.0, common=common)
    scaling = width**-0.5

    ours = [x.clone().requires_grad_() for x in inputs]
    output = products.attend(*ours, tiling, scaling, _Spoilt())
    gradients = torch.autograd.grad(output, ours, grad)

    exact = [x.double().requires_grad_() for x in inputs]
    expected = _formula(*exact, trie, window, scaling)
    assert output.dtype == torch.bfloat16
    assert _distance(output, expected) < 2**-8
    for gradient, exact_gradient in zip(gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert _distance(gradient, exact_gradient) < 2**-7


def test_gradients_of_a_key_that_many_queries_see_are_summed_in_float32():
    """1,000 sequences share their first token, each a tile of its own; in bfloat16 their sum would end at 256."""
    count = 1000
    trie = build_trie([[0, 1 + i] for i in range(count)])
    each = [Block(0, 1, ((0, 1),), True, True)]
    each += [Block(i, i + 1, ((0, 1), (i, i + 1)), True, False) for i in range(1, count + 1)]
    tiling = batch_tiles(cut_into_tiles(each, trie, None, 1), count + 1, None, 1, 1)
    query, key = torch.zeros(2, count + 1, 1, 16, dtype=torch.bfloat16)
    value = torch.zeros_like(key).requires_grad_()
    # Its own value is the token's half, that of the first the other half.
    output = products.attend(query, key, value, tiling, 1.0, Workspace())
    (gradient,) = torch.autograd.grad(output, value, torch.full_like(output, 2.0))
    torch.testing.assert_close(gradient[0], torch.full_like(gradient[0], count + 2))
    torch.testing.assert_close(gradient[1:], torch.ones_like(gradient[1:]))


@few
@given(sequence_lists, sequence_lists, windows, st.sampled_from([(1, 1), (8, 512)]), st.integers(1, 2000))
def test_tiles_ask_for_exactly_the_right_pairs_of_the_tokens_that_are_not_known(lent, sequences, window, costs, cap):
    lender = pack([[*tokens, 9] for tokens in lent], [len(tokens) + 1 for tokens in lent], lends=True)
    sequences = [[*tokens, 9, 9] for tokens in sequences]
    packed = pack(sequences, [len(tokens) - 1 for tokens in sequences], behind=lender).layout
    heads, key_heads = 4, 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "KEY_COST", costs[0])
        patch.setattr(products, "TILE_COST", costs[1])
        patch.setattr(products, "BATCH_COST", 50)
        patch.setattr(products, "BATCH_SCORES", cap)
        patch.setattr(products, "TILE_SCORES", cap)
        # One segment in several blocks.
        patch.setattr(blocks, "CHAIN_ROWS", 4)
        tiling = packed.tiling(window, heads, key_heads)

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
    """One token's queries are not divided. No tile has keys behind its last query."""
    monkeypatch.setattr(products, "BATCH_SCORES", largest)
    monkeypatch.setattr(products, "TILE_SCORES", largest)
    trie = _trie()
    tiles, tiling = _tiling(trie, window)
    assert tiles[0].start == 0
    assert tiles[-1].stop == len(trie.tokens)
    assert all(left.stop == right.start for left, right in itertools.pairwise(tiles))
    for tile in tiles:
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
        tiles, tiling = _tiling(trie, window)
        masks = {batch.mask.data_ptr(): batch.mask.numel() for batch in tiling.batches}
        assert sum(masks.values()) < len(trie.tokens) * length / 10
        for part in tiling.sums:
            rows = sum(len(batch.key_rows) for batch in part.batches)
            assert len(part.batches) == 1 or rows <= products.SUM_ROWS
        assert window is None or max(len(tile.keys) - tile.query_count for tile in tiles) <= window - 1


def test_a_branch_asks_for_its_own_ancestors_alone():
    """Where branches are long enough; few scores are made that nobody may see."""
    trie = _trie(prompt=250, branches=8, branch=70)
    _, tiling = _tiling(trie, None)
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
        return sum((size + products.KEY_COST) * stop for size, stop in zip(sizes, stops, strict=True))

    tiles = cut_into_tiles([block], trie, None, 9)
    sizes = [tile.query_count for tile in tiles]
    assert max(sizes) - min(sizes) <= 1
    best = min(cost([len(part) for part in np.array_split(range(queries), n)]) for n in range(1, queries + 1))
    assert cost(sizes) <= 1.02 * best


@few
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=7), st.sampled_from([1, 100, 2000])
)
def test_no_cheaper_batches_of_tiles_in_order_of_their_size(sizes, batch_cost):
    tiles = []
    for queries, before in sizes:
        start = tiles[-1].stop if tiles else 0
        tiles.append(products.Tile(start, start + queries, np.arange(before + queries), None))

    def cost(shape):
        count, queries, keys = shape
        return count * keys * (queries + products.KEY_COST) + batch_cost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "BATCH_COST", batch_cost)
        made = batch_tiles(tiles, 200, None, heads=1, key_heads=1)
    assert sum(batch.shape[0] for batch in made.batches) == len(tiles)
    ordered = sorted(tiles, key=lambda tile: (len(tile.keys), tile.query_count))
    for cuts in itertools.product((False, True), repeat=len(tiles) - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(tiles)]
        parts = [ordered[start:stop] for start, stop in itertools.pairwise(bounds)]
        shapes = [
            (len(part), max(x.query_count for x in part), 16 * -(-max(len(x.keys) for x in part) // 16))
            for part in parts
        ]
        assert sum(cost(batch.shape) for batch in made.batches) <= sum(map(cost, shapes))


def test_layers_with_the_same_view_share_tiles():
    packed = PackedLayout(_trie())
    assert packed.tiling(None, 6, 3) is packed.tiling(10**6, 6, 3)
    assert packed.tiling(None, 6, 3) is not packed.tiling(25, 6, 3)
    assert packed.tiling(None, 6, 3) is not packed.tiling(None, 6, 2)


@pytest.fixture
def calls(monkeypatch):
    """How often attention was computed by products."""
    seen = []
    attend = products.attend
    monkeypatch.setattr(attention.products, "attend", lambda *args: seen.append(args) or attend(*args))
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_under_autocast_is_near_itself_in_float32(name, calls):
    """Behind another batch too; the same is asked of PyTorch's kernel, which is at most as near."""
    sequences, starts = grouped_sequences()
    model = build(CONFIGS[name])
    enable_packed_attention(model)

    def run(half):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            lender = pack(sequences, starts, lends=True)
            states = hidden_states(model.model, lender)[lender.predictor].float()
            behind = pack([[*x[:-1], 7, *x[-1:]] for x in sequences], starts, behind=lender)
            with torch.no_grad():
                others = hidden_states(model.model, behind)[behind.predictor].float()
        weights = [weight for weight in model.model.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(states.square().sum(), weights, allow_unused=True)
        return [states.detach(), others, torch.cat([g.flatten() for g in gradients if g is not None])]

    expected = run(half=False)
    assert not calls
    ours = run(half=True)
    assert calls
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.products, "can_multiply", lambda *args: False)
        kernels = run(half=True)
    for found, by_kernel, exact in zip(ours, kernels, expected, strict=True):
        assert 0 < _distance(found, exact.double()) < 1.5 * _distance(by_kernel, exact.double())


def test_only_bfloat16_on_a_processor_without_dropout_is_computed_by_products():
    half, full = torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, 1)
    assert can_multiply(half, half, half, 0.0)
    assert not can_multiply(half, half, half, 0.1)
    assert not can_multiply(half, full, half, 0.0)
    assert not can_multiply(full, full, full, 0.0)
    on_meta = half.to("meta")
    assert not can_multiply(on_meta, on_meta, on_meta, 0.0)
