"""``optimise`` changes the layers that it should, only where it should, and nothing that is left out."""

from __future__ import annotations

import pytest
import torch
from tiny import tokenizer
from tiny_models import SIZES, build
from transformers import LlamaConfig

from vpd.config import ModelSettings
from vpd.policy.cpu import OPTIMISATIONS, optimise
from vpd.policy.cpu.embedding import TiedEmbedding
from vpd.policy.prepare import prepare_policy

LAYERS = SIZES["num_hidden_layers"]
ALL = {"norms": 2 * LAYERS, "rotary": LAYERS, "mlps": LAYERS, "embedding": 1, "last_layer": 1}


@pytest.fixture
def model():
    return build(LlamaConfig(**SIZES, tie_word_embeddings=True))


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def test_all_of_a_model_is_changed_once_and_its_numbers_and_names_stay(model):
    tokens = torch.arange(3, 40)[None]
    expected, names = model(tokens).logits, list(model.state_dict())
    assert optimise(model, ModelSettings()) == ALL
    torch.testing.assert_close(model(tokens).logits, expected)
    assert list(model.state_dict()) == names
    assert optimise(model, ModelSettings()) == dict.fromkeys(ALL, 0)


def test_gradient_checkpointing_leaves_nothing_as_it_was(model):
    """It hooks the embedding, and what others have hooked is not changed: so it comes last."""
    settings = ModelSettings(gradient_checkpointing=True)
    policy, _ = prepare_policy(model, tokenizer(), settings)
    assert policy.model.is_gradient_checkpointing
    assert type(policy.model.get_input_embeddings()) is TiedEmbedding
    assert optimise(model, settings) == dict.fromkeys(ALL, 0)


@pytest.mark.parametrize("name", OPTIMISATIONS)
def test_one_may_be_left_out(model, name):
    assert optimise(model, ModelSettings(), skip={name}) == {other: n for other, n in ALL.items() if other != name}


def test_a_name_that_there_is_not_is_refused(model):
    with pytest.raises(ValueError, match=r"no optimisation norm to skip; there are norms, rotary"):
        optimise(model, ModelSettings(), skip={"norm", "rotary"})


@pytest.mark.parametrize("reason", ["an accelerator", "the settings"])
def test_layers_stay_where_there_is_an_accelerator_or_the_settings_say_so(model, monkeypatch, reason):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: reason == "an accelerator")
    classes = [type(module) for module in model.modules()]
    assert optimise(model, ModelSettings(fused_layers=reason == "an accelerator")) == {}
    assert [type(module) for module in model.modules()] == classes
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
