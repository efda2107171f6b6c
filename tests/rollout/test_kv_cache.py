import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from vpd.rollout.kv_cache import MIN_GROWTH, PreallocatedLayer, StatefulCache, compaction, make_cache

HEADS, WIDTH = 2, 4


def states(rows, length):
    return torch.randn(rows, HEADS, length, WIDTH)


def make_cache_of_one_layer():
    return make_cache(LlamaConfig(num_hidden_layers=1), max_length=50)


def test_holds_what_a_growing_concatenation_would_hold():
    layer = PreallocatedLayer(max_length=400)
    expected_keys, expected_values = states(3, 5), states(3, 5)
    layer.update(expected_keys, expected_values)
    for step in range(3 * MIN_GROWTH):
        keys, values = states(3, 1), states(3, 1)
        expected_keys = torch.cat([expected_keys, keys], dim=2)
        expected_values = torch.cat([expected_values, values], dim=2)
        seen_keys, seen_values = layer.update(keys, values)
        assert layer.get_seq_length() == 6 + step
    torch.testing.assert_close(seen_keys, expected_keys)
    torch.testing.assert_close(seen_values, expected_values)


def test_storage_grows_rarely_and_not_beyond_the_limit():
    layer = PreallocatedLayer(max_length=300)
    layer.update(states(1, 10), states(1, 10))
    storages = set()
    for _ in range(290):
        layer.update(states(1, 1), states(1, 1))
        storages.add((layer.keys.data_ptr(), layer.keys.shape[-2]))
    assert len(storages) <= 4
    assert max(capacity for _, capacity in storages) == 300


def test_rows_expand_and_drop_as_an_index_would_select_them():
    layer_keys, layer_values = states(2, 7), states(2, 7)
    cache = make_cache_of_one_layer()
    cache.update(layer_keys, layer_values, 0)
    rows = torch.tensor([1, 0, 0, 1, 1])
    cache.expand(rows)
    order = cache.keep_rows([1, 3, 4], torch.device("cpu"))
    assert sorted(order) == [1, 3, 4]
    new_keys, new_values = states(3, 1), states(3, 1)
    keys, values = cache.update(new_keys, new_values, 0)
    torch.testing.assert_close(keys, torch.cat([layer_keys[rows[order]], new_keys], dim=2))
    torch.testing.assert_close(values, torch.cat([layer_values[rows[order]], new_values], dim=2))


@given(st.sets(st.integers(0, 20), min_size=1))
def test_compaction_moves_no_row_that_is_in_place(kept):
    rows = sorted(kept)
    order, holes, fillers = compaction(rows)
    assert sorted(order) == rows
    assert all(order[place] == row for place, row in zip(holes, fillers, strict=True))
    assert all(order[place] == place for place in range(len(rows)) if place not in holes)


@pytest.mark.parametrize(("name", "stateful"), [("llama", False), ("gemma3", False), ("qwen3_next", True)])
def test_only_models_that_carry_a_state_keep_transformers_own_layers(make_model, name, stateful):
    assert isinstance(make_cache(make_model(name).config, 10), StatefulCache) == stateful
