"""Prompts are computed packed where a network was seen to allow it, and its cache is filled as by padded ones."""

import dataclasses

import numpy as np
import pytest
import torch
from engines import generate
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from vpd.packing import PackedLayout
from vpd.packing.trie import build_trie
from vpd.rollout import LocalEngine, prefill, prompt_groups
from vpd.rollout import decode_attention as attention
from vpd.rollout.inference_copy import copy_for_inference
from vpd.rollout.kv_cache import PreallocatedLayer, make_cache
from vpd.rollout.prefill import Prefill, padding_mask, prefill_packed, prefill_padded
from vpd.rollout.prompt_groups import PromptGroups

PROMPTS = [(5, 6, 7, 8, 9, 10), (20, 21, 22), (5, 6, 7, 30), (5, 6), (40,)]
PACKED = {"llama", "qwen3", "gemma3"}
SHARED = {"llama", "qwen3"}


def network(make_model, name, bfloat16=False):
    return copy_for_inference(make_model(name), bfloat16=bfloat16)


def counted_tokens(engine):
    """Shapes of what the engine's network computes, from now on."""
    shapes = []
    engine._copy.network.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neo", "mpt", "qwen3_next"])
def test_what_a_network_allows_is_found_out(make_model, name, bfloat16):
    found = Prefill(network(make_model, name, bfloat16))
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
        prefill_packed(subject, prompts, caches[0]), prefill_padded(subject, prompts, caches[1]), atol=1e-4, rtol=1e-4
    )
    mask = padding_mask(prompts, torch.device("cpu"))
    assert mask.sum(1).tolist() == [len(prompt) for prompt in prompts]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        assert [layer.get_seq_length() for layer in layers] == [20, 20]
        for ours, theirs in zip(*((layer.keys, layer.values) for layer in layers), strict=True):
            seen = mask[:, None, :, None].bool().expand_as(ours)
            torch.testing.assert_close(ours[seen], theirs[seen], atol=1e-5, rtol=1e-4)


def test_what_prompts_begin_with_is_computed_once_and_nothing_is_padded(make_model, tokenizer):
    engine = LocalEngine(make_model("llama"), tokenizer, dtype="float32")
    shapes = counted_tokens(engine)
    generate(engine, [*PROMPTS, PROMPTS[0]], num_generations=2, max_new_tokens=2, eos_token_ids=())
    # (5, 6, 7, 8, 9, 10), (20, 21, 22), 30 after (5, 6, 7), nothing for (5, 6), and (40,).
    assert shapes == [(1, 6 + 3 + 1 + 0 + 1), (12, 1)]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_network_whose_tokens_see_what_they_must_not_is_not_packed(make_model, monkeypatch, caplog, bfloat16):
    def all_see_all(sequences, **kwargs):
        trie = build_trie(sequences, **kwargs)
        return dataclasses.replace(trie, subtree_end=np.full_like(trie.subtree_end, len(trie.tokens)))

    subject = network(make_model, "llama", bfloat16)
    assert Prefill(subject).packs
    monkeypatch.setattr("vpd.packing.batch.build_trie", all_see_all)
    with caplog.at_level("INFO"):
        assert not Prefill(subject).packs
    assert "Prompts are padded, not packed: a trial was" in caplog.text


def test_a_network_whose_window_is_not_heeded_is_not_packed(make_model, monkeypatch):
    def without_window(*args, **kwargs):
        return attend(*args, **{**kwargs, "sliding_window": None})

    subject = network(make_model, "gemma3")
    assert Prefill(subject).packs
    attend = attention.packed_attention_forward
    monkeypatch.setattr(attention, "packed_attention_forward", without_window)
    assert not Prefill(subject).packs


@pytest.mark.parametrize("changed", ["logits", "keys", "values"])
def test_what_differs_is_not_packed(make_model, monkeypatch, changed):
    def with_something_else(network, prompts, cache):
        logits = prefill_packed(network, prompts, cache)
        if changed == "logits":
            return logits.flip(0)
        states = getattr(cache.layers[1], changed)
        states[1, 0, -1] *= 2.0
        return logits

    monkeypatch.setattr(prefill, "prefill_packed", with_something_else)
    assert not Prefill(network(make_model, "llama")).packs


def test_generations_share_nothing_where_a_step_comes_out_otherwise(make_model, monkeypatch):
    scatter, subject = PromptGroups.scatter, network(make_model, "llama")
    monkeypatch.setattr(PromptGroups, "scatter", lambda self, slots: scatter(self, slots).flip(0))
    assert not Prefill(subject).shares


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
    full = make_cache(subject.config, max_length=8)
    prefill_packed(subject, PROMPTS, full)
    with pytest.raises(ValueError, match="no place of its own"):
        prefill_packed(subject, PROMPTS, full)
    subject.model.layers[1].self_attn.layer_idx = 7
    with pytest.raises(ValueError, match="no place of its own"):
        prefill_packed(subject, PROMPTS, make_cache(subject.config, max_length=8))


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


def test_nor_beyond_a_window_that_the_trial_does_not_reach(make_model):
    subject = network(make_model, "gemma3")
    subject.config.sliding_window = 64
    for layer in subject.model.layers:
        layer.self_attn.sliding_window = 64 if layer.self_attn.sliding_window else None
    assert not Prefill(subject).shares


def test_a_vocabulary_of_three_words_is_enough(make_model):
    config = make_model("llama").config
    config.vocab_size = 3
    found = Prefill(copy_for_inference(AutoModelForCausalLM.from_config(config), bfloat16=False))
    assert found.packs
    assert found.shares


def test_nothing_is_tried_elsewhere_than_on_a_processor(make_model, caplog):
    with caplog.at_level("INFO"):
        found = Prefill(network(make_model, "llama").to("meta"))
    assert not found.packs
    assert not found.shares
    assert not caplog.records


def test_an_attention_that_is_not_ours_neither_packs_nor_shares(make_model):
    model = make_model("llama")
    model._supports_attention_backend = False
    found = Prefill(copy_for_inference(model, bfloat16=False))
    assert not found.packs
    assert not found.shares


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_model_with_adapters_is_packed_too(make_model, tokenizer):
    model = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    engine = LocalEngine(model, tokenizer, dtype="float32")
    shapes = counted_tokens(engine)
    generate(engine, PROMPTS, max_new_tokens=1, eos_token_ids=())
    assert shapes == [(1, 11)]


@pytest.mark.parametrize(
    ("name", "packs", "shares", "reason"),
    [
        ("deepseek_v3", False, False, "numbers in place of"),
        ("nemotron", False, True, "Not all layers"),
        ("doge", True, False, "without a mask"),
        ("gemma3n", False, False, "no place of its own"),
    ],
)
def test_the_log_says_why_not(make_model, caplog, name, packs, shares, reason):
    with caplog.at_level("INFO"):
        found = Prefill(network(make_model, name))
    assert (found.packs, found.shares) == (packs, shares)
    assert reason in caplog.text


def test_the_log_says_what_the_description_tells(make_model, caplog):
    with caplog.at_level("INFO"):
        Prefill(network(make_model, "gpt_neo"))
    assert "does not take its attention from transformers' interface" in caplog.text


@pytest.mark.parametrize("name", ["deepseek_v3", "nemotron", "doge", "gemma3n"])
def test_architectures_of_other_kinds_sample_as_before(make_model, tokenizer, monkeypatch, name):
    """Whatever is found out about them, and with prompts shared wherever that was found to work."""
    monkeypatch.setattr(prompt_groups, "MINIMUM_SAVING", 1)
    model = make_model(name).eval()
    engine = LocalEngine(model, tokenizer, dtype="float32")
    found = generate(engine, PROMPTS, num_generations=2, max_new_tokens=6, temperature=0, eos_token_ids=())
    for prompt, samples in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
            )
        assert [sample.token_ids for sample in samples] == [expected[0, len(prompt) :].tolist()] * 2
