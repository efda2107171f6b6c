import copy

import pytest
import torch
from engines import generate
from peft import LoraConfig, get_peft_model

from vpd.rollout import LocalEngine, prompt_groups
from vpd.rollout.inference_copy import copy_for_inference

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33, 34], [40]]
# PEFT reads an attribute that transformers has renamed.
IGNORE_PEFT_WARNING = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
REARRANGES_WEIGHTS = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN does not compute bfloat16 here"
)
ALL_MODELS = ["llama", "qwen3", "gemma3", "qwen3_next"]


@pytest.fixture(autouse=True, params=[10**9, 1], ids=["copied", "shared"])
def _prompts_of_generations(request, monkeypatch):
    """Each generation has a copy of its prompt's cache, or all share it where the model allows it."""
    monkeypatch.setattr(prompt_groups, "MINIMUM_SAVING", request.param)


def engine(model, tokenizer, **kwargs):
    return LocalEngine(model, tokenizer, **{"dtype": "float32", **kwargs})


def token_ids(samples):
    return [[sample.token_ids for sample in group] for group in samples]


@pytest.mark.parametrize("name", ALL_MODELS)
def test_greedy_equals_transformers_generate(make_model, tokenizer, name):
    model = make_model(name)
    samples = generate(engine(model, tokenizer), PROMPTS, max_new_tokens=20, temperature=0, eos_token_ids={2, 3})
    model.eval()
    model.generation_config.eos_token_id = [2, 3]
    for prompt, (sample,) in zip(PROMPTS, samples, strict=True):
        generated = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20, do_sample=False
        )
        assert sample.token_ids == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ALL_MODELS)
def test_log_probs_equal_those_of_a_plain_forward(make_model, tokenizer, name):
    model = make_model(name)
    samples = generate(
        engine(model, tokenizer),
        PROMPTS,
        num_generations=3,
        max_new_tokens=20,
        temperature=0.8,
        top_k=20,
        eos_token_ids=range(2, 12),
        seed=3,
    )
    lengths = {len(sample.token_ids) for group in samples for sample in group}
    assert len(lengths) > 3, "sequences must end at different steps for rows to be dropped"
    model.eval()
    for prompt, group in zip(PROMPTS, samples, strict=True):
        for sample in group:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + sample.token_ids]), use_cache=False).logits[0]
            log_probs = (logits[len(prompt) - 1 : -1] / 0.8).log_softmax(dim=-1)
            expected = log_probs.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.log_probs), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_the_draw_does_not_depend_on_the_batch(make_model, tokenizer, name):
    model = make_model(name)
    settings = {"num_generations": 3, "max_new_tokens": 12, "eos_token_ids": range(2, 12), "seed": 5}
    expected = token_ids(generate(engine(model, tokenizer), PROMPTS, **settings))
    for batch_size in (1, 2, 4, 7):
        assert token_ids(generate(engine(model, tokenizer, batch_size=batch_size), PROMPTS, **settings)) == expected
    assert token_ids(generate(engine(model, tokenizer), PROMPTS, **{**settings, "seed": 6})) != expected
    assert len({tuple(ids) for group in expected for ids in group}) > 6, "the generations of a prompt differ"


def test_sampled_first_tokens_follow_the_models_distribution(make_model, tokenizer):
    model = make_model("llama")
    count = 3000
    (group,) = generate(
        engine(model, tokenizer, batch_size=1000),
        [PROMPTS[0]],
        num_generations=count,
        max_new_tokens=1,
        eos_token_ids=[],
        seed=1,
    )
    with torch.no_grad():
        probabilities = model.eval()(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(dim=-1)
    frequencies = torch.bincount(torch.tensor([sample.token_ids[0] for sample in group]), minlength=97) / count
    deviation = (frequencies - probabilities).abs() / (probabilities * (1 - probabilities) / count).sqrt()
    assert deviation[probabilities > 0.005].max() < 4


def test_each_distinct_prompt_is_computed_once(make_model, tokenizer):
    subject = engine(make_model("llama"), tokenizer)
    shapes = []
    subject._copy.network.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generate(subject, [*PROMPTS, PROMPTS[1]], num_generations=3, max_new_tokens=4, eos_token_ids=[])
    assert shapes == [(1, sum(map(len, PROMPTS)))] + [(15, 1)] * 3


SYSTEM = list(range(50, 90))


@pytest.mark.parametrize("name", [*ALL_MODELS, "gpt_neo", "mpt"])
@pytest.mark.parametrize(
    "tails", [[[5, 6, 7, 8], [20, 21], [22], [30], [31, 32, 33]], [[5, 6], [7, 8], [9, 4], [3, 2], [4, 4]]]
)
def test_what_all_prompts_begin_with_is_computed_once_and_changes_nothing(make_model, tokenizer, name, tails):
    subject, prompts = engine(make_model(name), tokenizer), [SYSTEM + tail for tail in tails]
    calls = []
    subject._copy.network.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    settings = {"num_generations": 2, "max_new_tokens": 6, "eos_token_ids": range(2, 12), "seed": 4}
    shared = generate(subject, prompts, **settings)
    # Those with a state, and those whose attention is not transformers' common one, compute every prompt whole.
    is_packed = name in ("llama", "qwen3", "gemma3")
    assert (calls[0] == (1, len(SYSTEM) + sum(map(len, tails)))) == is_packed
    subject._decoder.prefill.packs = False
    calls.clear()
    alone = generate(subject, prompts, **settings)
    assert calls[0][1] == max(len(prompt) for prompt in prompts)
    assert token_ids(shared) == token_ids(alone)
    for left, right in zip(shared, alone, strict=True):
        for a, b in zip(left, right, strict=True):
            assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)


def test_a_model_that_carries_a_state_never_sees_padding(make_model, tokenizer):
    subject = engine(make_model("qwen3_next"), tokenizer)
    calls = []
    subject._copy.network.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    generate(subject, PROMPTS, num_generations=2, max_new_tokens=1, eos_token_ids=[])
    assert [call["input_ids"].tolist() for call in calls] == [[prompt] for prompt in sorted(PROMPTS, key=len)[::-1]]
    assert all(call["attention_mask"] is None for call in calls)


def test_finished_sequences_leave_the_batch(make_model, tokenizer):
    subject = engine(make_model("llama"), tokenizer)
    rows = []
    subject._copy.network.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    samples = generate(subject, PROMPTS, num_generations=4, max_new_tokens=10, eos_token_ids=range(2, 20), seed=2)
    lengths = [len(sample.token_ids) for group in samples for sample in group]
    assert len(set(lengths)) > 3, "sequences must end at different steps"
    assert rows[1:] == [count for step in range(1, 10) if (count := sum(length > step for length in lengths))]


def test_ends_and_truncation(make_model, tokenizer):
    model = make_model("llama")
    eos_token_ids = {4, 5, 6, 7, 8, 9, 10, 11}
    samples = generate(
        engine(model, tokenizer),
        PROMPTS,
        num_generations=8,
        max_new_tokens=8,
        eos_token_ids=eos_token_ids,
        stop_strings=["A", "bc"],
        seed=0,
    )
    ends = {"eos": 0, "stop": 0, "length": 0}
    for group in samples:
        for sample in group:
            text = tokenizer.decode(sample.token_ids)
            by_eos = sample.token_ids[-1] in eos_token_ids
            by_stop = "A" in text or "bc" in text
            assert sample.truncated == (not by_eos and not by_stop)
            assert not eos_token_ids & set(sample.token_ids[:-1])
            assert "A" not in tokenizer.decode(sample.token_ids[:-1])
            assert len(sample.token_ids) == len(sample.log_probs)
            assert not sample.truncated or len(sample.token_ids) == 8
            ends["eos" if by_eos else "stop" if by_stop else "length"] += 1
    assert min(ends.values()) > 0, ends


@IGNORE_PEFT_WARNING
@pytest.mark.parametrize("lora", [False, True])
def test_the_inference_copy_follows_the_weights_after_sync(make_model, tokenizer, lora):
    model = make_model("llama")
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    subject = engine(model, tokenizer, dtype="bfloat16")

    def log_probs(subject):
        (group,) = generate(subject, PROMPTS[:1], max_new_tokens=6, temperature=0, eos_token_ids=[])
        return group[0].log_probs

    before = log_probs(subject)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.ones_like(parameter))
    assert log_probs(subject) == before
    subject.sync()
    assert log_probs(subject) != before
    assert log_probs(subject) == log_probs(engine(model, tokenizer, dtype="bfloat16"))


@IGNORE_PEFT_WARNING
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_released_engine_holds_no_copies_and_samples_from_the_weights_as_they_are(make_model, tokenizer, dtype, lora):
    plain = model = make_model("llama")
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    subject = engine(model, tokenizer, dtype=dtype)

    def log_probs(subject):
        return generate(subject, PROMPTS[:1], max_new_tokens=6, temperature=0, eos_token_ids=[])[0][0].log_probs

    before = log_probs(subject)
    subject.release()
    own = [
        p for p in subject._copy.network.parameters() if p.data_ptr() not in {q.data_ptr() for q in model.parameters()}
    ]
    assert sum(parameter.numel() for parameter in own) == 0
    assert not any(hasattr(module, "rearranged") for module in subject._copy.network.modules())
    assert all(parameter.numel() for parameter in model.parameters())
    subject.release()
    assert log_probs(subject) == before
    network = subject._copy.network.get_base_model() if lora else subject._copy.network
    assert network.lm_head.weight is network.model.embed_tokens.weight
    subject.release()
    with torch.no_grad():
        plain.model.embed_tokens.weight.mul_(1.5)
    assert log_probs(subject) == log_probs(engine(model, tokenizer, dtype=dtype)) != before


def names_without_rows(subject):
    return {name for name, parameter in subject._copy.network.named_parameters() if not parameter.numel()}


@REARRANGES_WEIGHTS
@IGNORE_PEFT_WARNING
@pytest.mark.parametrize("lora", [False, True])
def test_rearranged_weights_are_held_once(make_model, tokenizer, lora):
    model = make_model("llama")
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    subject = engine(model, tokenizer, dtype="bfloat16")
    # The head's weight is the embedding's, which looks words up in its rows.
    linear = {name for name, parameter in model.named_parameters() if parameter.dim() == 2 and "embed" not in name}
    assert len(linear) == (14 + 8 if lora else 14)
    assert names_without_rows(subject) == linear
    subject.release()
    subject.sync()
    assert names_without_rows(subject) == linear


@REARRANGES_WEIGHTS
def test_rows_that_belong_to_the_model_stay(make_model, tokenizer, caplog):
    model = make_model("llama").bfloat16()
    caplog.set_level("INFO", "vpd.rollout.inference_copy")
    subject = engine(model, tokenizer, dtype="bfloat16")
    assert not caplog.text
    assert not names_without_rows(subject)
    assert any(hasattr(module, "rearranged") for module in subject._copy.network.modules())
    subject.release()
    assert all(parameter.numel() for parameter in model.parameters())


@REARRANGES_WEIGHTS
@IGNORE_PEFT_WARNING
def test_rows_that_a_forward_reads_are_kept(make_model, tokenizer, caplog):
    model = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    caplog.set_level("INFO", "vpd.rollout.inference_copy")
    subject = engine(model, tokenizer, dtype="bfloat16")
    assert "kept in their rows" in caplog.text
    for _ in range(2):
        generate(subject, PROMPTS[:1], max_new_tokens=2, eos_token_ids=[])
        assert not names_without_rows(subject)
        subject.release()


@IGNORE_PEFT_WARNING
def test_sync_refuses_a_model_whose_modules_have_changed(make_model, tokenizer):
    model = make_model("llama")
    subject = engine(model, tokenizer)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="make a new engine"):
        subject.sync()


def test_a_float32_engine_shares_the_weights_and_a_bfloat16_engine_keeps_ties(make_model):
    model = make_model("llama")
    shared = copy_for_inference(model, bfloat16=False)
    assert [id(p) for p in shared.parameters()] == [id(p) for p in model.parameters()]
    converted = copy_for_inference(model, bfloat16=True)
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    assert converted.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_and_the_random_state_stay_as_they_were(make_model, tokenizer, dtype):
    model = make_model("llama")
    model.model.layers[0].eval()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.set_attn_implementation("eager")
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    subject = engine(model, tokenizer, dtype=dtype)
    generate(subject, PROMPTS, num_generations=2, max_new_tokens=5, eos_token_ids=[2], top_p=0.9)
    subject.sync()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "eager"
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    model(torch.tensor([PROMPTS[0]])).logits.sum().backward()


def test_a_wrapped_forward_is_refused(make_model, tokenizer):
    model = make_model("llama")
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match="bare model"):
        LocalEngine(model, tokenizer)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "Prompt 1 is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"num_generations": 0}, "num_generations is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1"),
        ([[1]], {"stop_strings": ["", "a"]}, "empty string"),
    ],
)
def test_settings_without_meaning_are_refused(make_model, tokenizer, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(
            engine(make_model("llama"), tokenizer), prompts, **{"max_new_tokens": 4, "eos_token_ids": [2], **settings}
        )
