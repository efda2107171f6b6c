"""Generations of a prompt share one copy of its keys and values, and sample what they would alone."""

import pytest
import torch
import torch.nn.functional as F
from engines import generate
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from vpd.rollout import LocalEngine, prompt_groups
from vpd.rollout.decode_attention import rollout_attention_forward
from vpd.rollout.kv_cache import PreallocatedCache, make_cache
from vpd.rollout.prompt_groups import PromptGroups

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33, 34], [40]]
CPU = torch.device("cpu")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.data())
def test_rows_find_their_way_to_their_prompt_and_back(drawn, data):
    names = {prompt: place for place, prompt in enumerate(dict.fromkeys(drawn))}
    prompts = [names[prompt] for prompt in drawn]
    subject = PromptGroups(prompts, None, torch.float32, CPU)
    order = data.draw(st.permutations(range(len(prompts))))[: data.draw(st.integers(1, len(prompts)))]
    for kept in (list(range(len(prompts))), order):
        if kept is order:
            subject.keep_rows(kept)
        own = torch.tensor([prompts[row] for row in kept])
        # Rows of 2 heads with 3 queries each.
        rows = own[:, None, None, None] + torch.arange(6.0).view(1, 2, 3, 1) / 10 + torch.rand(len(kept), 1, 1, 1) / 100
        gathered = subject.gather(rows)
        assert gathered.shape[:2] == (len(names), 2)
        torch.testing.assert_close(subject.scatter(gathered), rows)
        doubled = subject.scatter(gathered + 10 * torch.arange(len(names)).view(-1, 1, 1, 1))
        torch.testing.assert_close(doubled, rows + 10 * own[:, None, None, None])


def samples_of(model, tokenizer, monkeypatch, least, prompts=PROMPTS, dtype="float32", **settings):
    """What the engine samples, and in which passes its cache was shared."""
    monkeypatch.setattr(prompt_groups, "MINIMUM_SAVING", least)
    shared = []
    engine = LocalEngine(model, tokenizer, dtype=dtype)
    engine._copy.network.register_forward_pre_hook(
        lambda module, args, kwargs: shared.append("packed" not in kwargs and kwargs["past_key_values"].shares_prompts),
        with_kwargs=True,
    )
    settings = {"num_generations": 4, "max_new_tokens": 12, "eos_token_ids": range(2, 12), "seed": 2, **settings}
    return [sample for group in generate(engine, prompts, **settings) for sample in group], shared


@pytest.mark.parametrize(
    "prompts", [PROMPTS, [[5, 6, 7], [8, 9, 10], [5, 6, 7]], [[*range(50, 90), last] for last in (5, 6, 7, 8, 9)]]
)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neo", "mpt", "qwen3_next"])
def test_shared_prompts_change_no_sample(make_model, tokenizer, monkeypatch, name, prompts):
    model = make_model(name)
    alone, never = samples_of(model, tokenizer, monkeypatch, 10**9, prompts)
    together, shared = samples_of(model, tokenizer, monkeypatch, 1, prompts)
    assert not any(never)
    # Those with a window, a state or positions that are not rotary keep a prompt for each row.
    assert any(shared) == (name in ("llama", "qwen3"))
    assert len({len(sample.token_ids) for sample in alone}) > 3, "sequences must end at different steps"
    assert [sample.token_ids for sample in together] == [sample.token_ids for sample in alone]
    for left, right in zip(together, alone, strict=True):
        assert left.log_probs == pytest.approx(right.log_probs, abs=1e-4)


def test_in_bfloat16_they_differ_by_rounding(make_model, tokenizer, monkeypatch):
    model = make_model("llama")
    alone, _ = samples_of(model, tokenizer, monkeypatch, 10**9, dtype="bfloat16", temperature=0)
    together, shared = samples_of(model, tokenizer, monkeypatch, 1, dtype="bfloat16", temperature=0)
    assert any(shared)
    first_steps = [(left.log_probs[1], right.log_probs[1]) for left, right in zip(alone, together, strict=True)]
    assert all(left == pytest.approx(right, abs=0.05) for left, right in first_steps)


def test_when_most_have_left_the_rest_take_their_prompts_along(make_model, tokenizer, monkeypatch):
    model = make_model("llama")
    # 16 rows of 4 prompts of 9 places, 2 heads, 8 numbers: shared down to 8 rows.
    _, shared = samples_of(model, tokenizer, monkeypatch, 4 * 9 * 16)
    assert shared[:2] == [False, True]
    assert not shared[-1]
    assert sorted(shared[1:], reverse=True) == shared[1:]


def test_few_generations_or_short_prompts_are_not_worth_it(make_model, tokenizer, monkeypatch):
    model = make_model("llama")
    for least, count, expected in ((12 * 9 * 16, 4, True), (12 * 9 * 16 + 1, 4, False), (1, 1, False)):
        _, shared = samples_of(
            model, tokenizer, monkeypatch, least, num_generations=count, eos_token_ids=(), max_new_tokens=2
        )
        assert shared == [False, expected]


@pytest.mark.parametrize("scaling", [None, 0.7])
def test_equals_attention_to_whole_rows(monkeypatch, scaling):
    monkeypatch.setattr(prompt_groups, "MINIMUM_SAVING", 1)
    cache = make_cache(LlamaConfig(num_hidden_layers=1), max_length=8)
    assert isinstance(cache, PreallocatedCache)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    key, value = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    cache.update(key, value, 0)
    prompts = [0, 1, 0, 0]
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    assert cache.share_prompts(prompts, padding)
    keys, values, mask = key[prompts], value[prompts], padding[prompts].bool()
    for _ in range(3):
        query, key, value = torch.randn(4, 4, 1, 8), torch.randn(4, 2, 1, 8), torch.randn(4, 2, 1, 8)
        found, _ = rollout_attention_forward(module, query, *cache.update(key, value, 0), None, scaling=scaling)
        keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        mask = F.pad(mask, (0, 1), value=True)
        expected = F.scaled_dot_product_attention(
            query, keys, values, mask[:, None, None], scale=scaling, enable_gqa=True
        )
        torch.testing.assert_close(found, expected.transpose(1, 2))
    (layer,) = cache.layers
    assert layer.keys.shape[2] == 3, "room for what comes after the prompts"
    with pytest.raises(RuntimeError, match="without a mask"):
        rollout_attention_forward(module, query, *cache.update(key, value, 0), mask[:, None, None])
