"""Attention by products in bfloat16 is near the formula in float64, and serves the right passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pairs import branching_trie, tiling_of
from tiny_models import attention_configs, build, grouped_sequences

from vpd.device import multiplies_bfloat16
from vpd.packing import enable_packed_attention, hidden_states, pack
from vpd.packing.kernels import products, tiles
from vpd.packing.kernels.blocks import Block, allowed_pairs
from vpd.packing.kernels.products import Workspace, can_multiply
from vpd.packing.kernels.tiles import batch_tiles, cut_into_tiles
from vpd.packing.trie import build_trie

CONFIGS = attention_configs()
HEADS, KEY_HEADS = 6, 3

pytestmark = pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU has no products in bfloat16")


def _inputs(tokens, width, value_width, loudness, common=0.0):
    """Queries, keys, values and the output's gradient; scores are around ``loudness``, and the values and the output's
    gradient have ``common`` and 1 in common, which cancels in the gradient of the scores."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((HEADS, width), (KEY_HEADS, width), (KEY_HEADS, value_width), (HEADS, value_width))
    # Head by head in memory, which is not how they are read.
    query, key, value, grad = (
        torch.randn(heads, tokens, size, generator=generator).transpose(0, 1) for heads, size in shapes
    )
    return [x.bfloat16() for x in (query * loudness, key, value + common, grad + (common > 0))]


def _formula(query, key, value, trie, window, scaling):
    tokens = np.arange(len(trie.tokens))
    allowed = torch.from_numpy(allowed_pairs(trie, tokens, tokens, window))
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), value)


def _distance(left, right):
    right = right.detach()
    return float((left.detach().double() - right).norm() / right.norm())


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
    monkeypatch.setattr(tiles, "BATCH_SCORES", largest)
    monkeypatch.setattr(tiles, "TILE_SCORES", largest)
    monkeypatch.setattr(tiles, "SUM_ROWS", rows)
    trie = branching_trie()
    cut, tiling = tiling_of(trie, window)
    # 300 scores are those of one tile.
    assert (len(cut) > len(tiling.batches)) == (largest > 300)
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


@pytest.fixture
def calls(monkeypatch):
    """How often attention was computed by products."""
    seen = []
    attend = products.attend
    monkeypatch.setattr(products, "attend", lambda *args: seen.append(args) or attend(*args))
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_under_autocast_is_near_itself_in_float32(name, calls):
    """This also holds for a batch that is conditioned on another one. PyTorch's kernel is at most as near."""
    sequences, starts = grouped_sequences()
    model = build(CONFIGS[name])
    enable_packed_attention(model)

    def run(half):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            first = pack(sequences, starts, keeps_keys=True)
            states = hidden_states(model.model, first)[first.predictor].float()
            conditioned = pack([[*x[:-1], 7, *x[-1:]] for x in sequences], starts, conditioned_on=first)
            with torch.no_grad():
                others = hidden_states(model.model, conditioned)[conditioned.predictor].float()
        weights = [weight for weight in model.model.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(states.square().sum(), weights, allow_unused=True)
        return [states.detach(), others, torch.cat([g.flatten() for g in gradients if g is not None])]

    expected = run(half=False)
    assert not calls
    ours = run(half=True)
    assert calls
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "can_multiply", lambda *args: False)
        kernels = run(half=True)
    for found, by_kernel, exact in zip(ours, kernels, expected, strict=True):
        assert 0 < _distance(found, exact.double()) < 1.5 * _distance(by_kernel, exact.double())


def test_only_bfloat16_on_a_cpu_without_dropout_is_computed_by_products():
    half, full = torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, 1)
    assert can_multiply(half, half, half, 0.0)
    assert not can_multiply(half, half, half, 0.1)
    assert not can_multiply(half, full, half, 0.0)
    assert not can_multiply(full, full, full, 0.0)
    on_meta = half.to("meta")
    assert not can_multiply(on_meta, on_meta, on_meta, 0.0)
