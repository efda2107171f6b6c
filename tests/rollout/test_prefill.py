"""Prompts are computed packed where a network was seen to allow it, and its cache is filled as by padded ones."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from vpd.packing import PackedLayout
from vpd.rollout import LocalEngine, attention, prefill
from vpd.rollout.cache import PreallocatedLayer, make_cache
from vpd.rollout.local import make_twin
from vpd.rollout.prefill import Prefill, mask_of, packed, padded

PROMPTS = [(5, 6, 7, 8, 9, 10), (20, 21, 22), (5, 6, 7, 30), (5, 6), (40,)]
PACKED = {"llama", "qwen3", "gemma3"}
SHARED = {"llama", "qwen3"}


def network(make_model, name):
    return make_twin(make_model(name), bfloat16=False)


def counted_tokens(engine):
    """Shapes of what the engine's network computes, from now on."""
    shapes = []
    engine._twin.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neo", "mpt", "qwen3_next"])
def test_what_a_network_allows_is_found_out(make_model, name):
    found = Prefill(network(make_model, name))
    assert found.packs == (name in PACKED)
    assert found.shares == (name in SHARED)


@pytest.mark.parametrize("name", sorted(PACKED))
@torch.no_grad()
def test_packed_prompts_give_the_logits_and_the_cache_of_padded_ones(make_model, name):
    """Longer than gemma3's window too, one the beginning of another, and each with a row of its own."""
    subject = network(make_model, name)
    prompts = [*PROMPTS, tuple(range(50, 70))]
    caches = [make_cache(subject.config, max_length=40) for _ in range(2)]
    torch.testing.assert_close(
        packed(subject, prompts, caches[0]), padded(subject, prompts, caches[1]), atol=1e-4, rtol=1e-4
    )
    mask = mask_of(prompts, torch.device("cpu"))
    assert mask.sum(1).tolist() == [len(prompt) for prompt in prompts]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        assert [layer.get_seq_length() for layer in layers] == [20, 20]
        for ours, theirs in zip(*((layer.keys, layer.values) for layer in layers), strict=True):
            seen = mask[:, None, :, None].bool().expand_as(ours)
            torch.testing.assert_close(ours[seen], theirs[seen], atol=1e-5, rtol=1e-4)


def test_what_prompts_begin_with_is_computed_once_and_nothing_is_padded(make_model, tokenizer):
    engine = LocalEngine(make_model("llama"), tokenizer, dtype="float32")
    shapes = counted_tokens(engine)
    engine.generate([*PROMPTS, PROMPTS[0]], num_generations=2, max_new_tokens=2, eos_token_ids=())
    # (5, 6, 7, 8, 9, 10), (20, 21, 22), 30 behind (5, 6, 7), nothing for (5, 6), and (40,).
    assert shapes == [(1, 6 + 3 + 1 + 0 + 1), (12, 1)]


def test_what_differs_is_not_packed(make_model, monkeypatch):
    def of_other_tokens(network, prompts, cache):
        return packed(network, [(*prompt[:-1], 2) for prompt in prompts], cache)

    monkeypatch.setattr(prefill, "packed", of_other_tokens)
    assert not Prefill(network(make_model, "llama")).packs


def test_keys_that_differ_are_not_packed(make_model, monkeypatch):
    def with_a_key_too_large(network, prompts, cache):
        logits = packed(network, prompts, cache)
        cache.layers[1].keys[1, 0, 1:] *= 2.0
        return logits

    monkeypatch.setattr(prefill, "packed", with_a_key_too_large)
    assert not Prefill(network(make_model, "llama")).packs


def test_layers_without_a_place_of_their_own_in_the_cache_are_not_packed(make_model, monkeypatch):
    subject = network(make_model, "llama")
    keep = PackedLayout.keep

    def keep_as_if_the_layer_ran_twice(self, *states):
        keep(self, *states)
        keep(self, *states)

    monkeypatch.setattr(PackedLayout, "keep", keep_as_if_the_layer_ran_twice)
    assert not Prefill(subject).packs
    monkeypatch.undo()
    assert Prefill(subject).packs
    subject.model.layers[1].self_attn.layer_idx = 7
    with pytest.raises(ValueError, match="no place of its own"):
        packed(subject, PROMPTS, make_cache(subject.config, max_length=8))


@pytest.mark.parametrize("name", ["keys", "values"])
def test_generations_share_nothing_where_attention_reads_something_else_than_the_cache(make_model, monkeypatch, name):
    subject = network(make_model, "llama")
    update = PreallocatedLayer.update

    def changed_on_the_way(self, *states, **kwargs):
        keys, values = update(self, *states, **kwargs)
        return (keys * 1.0, values) if name == "keys" else (keys, values * 1.0)

    monkeypatch.setattr(PreallocatedLayer, "update", changed_on_the_way)
    assert not Prefill(subject).shares


def test_nor_where_attention_is_not_plain(make_model, monkeypatch):
    subject = network(make_model, "llama")
    monkeypatch.setattr(attention, "_NOT_PLAIN", ("scaling",))
    assert not Prefill(subject).shares


@pytest.mark.parametrize("width", [8, 10])
def test_nor_where_values_are_not_as_wide_as_keys(width):
    layer, module = PreallocatedLayer(max_length=8), torch.nn.Module()
    module.num_key_value_groups = 2
    keys, values = layer.update(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, width))
    attention.rollout_attention_forward(module, torch.randn(2, 4, 5, 8), keys, values, None)
    assert layer.knows_groups == (width == 8)


def test_an_attention_that_is_not_ours_neither_packs_nor_shares(make_model):
    model = make_model("llama")
    model._supports_attention_backend = False
    found = Prefill(make_twin(model, bfloat16=False))
    assert not found.packs
    assert not found.shares


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_model_with_adapters_is_packed_too(make_model, tokenizer):
    model = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    engine = LocalEngine(model, tokenizer, dtype="float32")
    shapes = counted_tokens(engine)
    engine.generate(PROMPTS, max_new_tokens=1, eos_token_ids=())
    assert shapes == [(1, 11)]
