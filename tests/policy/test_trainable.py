"""What cannot be trained is refused at the start, and half precision gets weights that updates can move."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from vpd.config import ConfigError, ModelSettings
from vpd.policy import prepare
from vpd.policy.prepare import prepare_policy

LORA = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")


def prepared(model, peft_config=None, **settings):
    return prepare_policy(model, tiny.tokenizer(), ModelSettings(**settings), peft_config)[0]


def test_weights_in_half_precision_are_trained_in_float32():
    module = prepared(tiny.llama().bfloat16())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_whoever_insists_on_bfloat16_is_told_what_it_costs(caplog):
    module = prepared(tiny.llama().bfloat16(), dtype="bfloat16")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert "below 1/512 of a weight is rounded away" in caplog.text


@pytest.mark.parametrize(
    ("model", "peft_config", "sentence"),
    [
        (lambda: tiny.llama().requires_grad_(False), None, "No parameter of the model is trained"),
        (lambda: tiny.llama().double(), None, "float64 weights"),
        (lambda: get_peft_model(tiny.llama(), LORA), LORA, "has adapters already"),
        (tiny.llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "put virtual tokens before"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_a_sentence(model, peft_config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        prepared(model(), peft_config)


def test_whatever_the_trial_of_packing_raises_is_named_and_packing_is_left_out(monkeypatch, caplog):
    def broken(*_):
        raise KeyError("cache")

    monkeypatch.setattr(prepare, "check_packed_equals_separate", broken)
    assert not prepared(tiny.llama()).share_prefixes
    assert "ended with KeyError: 'cache'" in caplog.text
