"""Attention by products in bfloat16 against the formula in float64, and what takes it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny_models import attention_configs, build, grouped_sequences

from vpd.packing import attention, enable_packed_attention, hidden_states, pack, products
from vpd.packing.blocks import Block, allowed_pairs, partition
from vpd.packing.layout import PackedLayout
from vpd.packing.products import Workspace, can_multiply, cut_into_tiles
from vpd.packing.trie import build_trie
from vpd.processor import multiplies_bfloat16

CONFIGS = attention_configs()
ROWS, KEY_HEADS = 2, 3

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
    shapes = ((tokens * ROWS, width), (tokens, width), (tokens, value_width), (tokens * ROWS, value_width))
    query, key, value, grad = (torch.randn(KEY_HEADS, *shape, generator=generator) for shape in shapes)
    return [x.bfloat16() for x in (query * loudness, key, value + common, grad + (common > 0))]


def _formula(query, key, value, trie, window, scaling):
    tokens = np.arange(len(trie.tokens))
    allowed = torch.from_numpy(allowed_pairs(trie, tokens, tokens, window)).repeat_interleave(ROWS, dim=0)
    scores = (query @ key.transpose(1, 2) * scaling).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ value


def _distance(left, right):
    right = right.detach()
    return float((left.detach().double() - right).norm() / right.norm())


@pytest.mark.parametrize("window", [None, 25])
@pytest.mark.parametrize("largest", [300, 4000, products.TILE_SCORES])
@pytest.mark.parametrize(("width", "value_width", "common"), [(64, 64, 0.0), (40, 16, 0.0), (64, 64, 10.0)])
def test_outputs_and_gradients_are_those_of_the_formula(window, largest, width, value_width, common):
    """Within the rounding of bfloat16 (8 bits), with scores so large that rounding them would show."""
    trie = _trie()
    layout = PackedLayout(trie)
    blocks = layout.plan(window).blocks
    masks = layout._build_masks(window, 1, torch.float32, torch.device("cpu"))
    tiled = cut_into_tiles(blocks, masks, ROWS * KEY_HEADS, largest)
    *inputs, grad = _inputs(len(trie.tokens), width, value_width, loudness=8.0, common=common)
    scaling = width**-0.5

    ours = [x.clone().requires_grad_() for x in inputs]
    output = products.attend(*ours, tiled, scaling, Workspace())
    gradients = torch.autograd.grad(output, ours, grad)

    exact = [x.double().requires_grad_() for x in inputs]
    expected = _formula(*exact, trie, window, scaling)
    assert output.dtype == torch.bfloat16
    assert _distance(output, expected) < 2**-8
    for gradient, exact_gradient in zip(gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert _distance(gradient, exact_gradient) < 2**-7


def test_tiles_hold_every_query_once_and_at_most_so_many_scores():
    for window, largest in itertools.product((None, 25), (1, 300, 4000, 2**20)):
        trie = _trie()
        blocks = partition(trie, window)
        layout = PackedLayout(trie)
        masks = layout._build_masks(window, 1, torch.float32, torch.device("cpu"))
        tiled = cut_into_tiles(blocks, masks, heads=6, largest=largest)
        tiles = [tile for block in tiled for tile in block.tiles]
        assert tiles[0].start == 0
        assert tiles[-1].stop == len(trie.tokens)
        assert all(left.stop == right.start for left, right in itertools.pairwise(tiles))
        for tile in tiles:
            tokens = tile.stop - tile.start
            assert tile.mask.shape[0] == tokens
            assert tokens == 1 or 6 * tokens * tile.key_count <= largest


def test_a_causal_block_makes_about_half_of_its_scores():
    trie = build_trie([list(range(256))])
    blocks = partition(trie)
    tiled = cut_into_tiles(blocks, [None] * len(blocks), heads=1, largest=4096)
    made = sum((tile.stop - tile.start) * tile.key_count for block in tiled for tile in block.tiles)
    assert 0.5 < made / 256**2 < 0.6


@pytest.mark.parametrize("window", [None, 25])
def test_no_tile_makes_scores_behind_its_last_query(window):
    """Of a causal block, of one behind other tokens, and of one with branches."""
    layout = PackedLayout(_trie())
    masks = layout._build_masks(window, 1, torch.float32, torch.device("cpu"))
    blocks = layout.plan(window).blocks
    for block, mask, tiled in zip(blocks, masks, cut_into_tiles(blocks, masks, 6, largest=6000), strict=True):
        before = block.key_count - block.query_count
        assert len(tiled.tiles) > 1
        for tile in tiled.tiles:
            last = tile.stop - block.start
            assert tile.key_count == before + last
            if mask is not None:
                torch.testing.assert_close(tile.mask, mask[tile.start - block.start : last, : tile.key_count])


@pytest.mark.parametrize("heads", [1, 9, 32])
@pytest.mark.parametrize("queries", [40, 344, 512])
def test_blocks_are_cut_where_scores_cost_more_than_a_further_tile(queries, heads):
    block = Block(26, 26 + queries, ((0, 26 + queries),), is_chain=True, is_causal=False)

    def cost(largest_size):
        bounds = [*range(0, queries, largest_size), queries]
        pairs = sum((stop - start) * (26 + stop) for start, stop in itertools.pairwise(bounds))
        return heads * pairs + products.TILE_COST * (len(bounds) - 1)

    (tiled,) = cut_into_tiles([block], [torch.zeros(queries, queries + 26)], heads, largest=2**40)
    sizes = [tile.stop - tile.start for tile in tiled.tiles]
    assert max(sizes) - min(sizes) <= 1
    made = heads * sum((tile.stop - tile.start) * tile.key_count for tile in tiled.tiles)
    assert made + products.TILE_COST * len(sizes) <= 1.02 * min(map(cost, range(1, queries + 1)))


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
