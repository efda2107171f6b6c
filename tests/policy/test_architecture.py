from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from vpd.config import ConfigError
from vpd.policy.architecture import backbone_of, head_of, verify_head

# peft 0.21 reads this property of transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
CONFIGS = [
    LlamaConfig(**SIZES),
    Qwen3Config(**SIZES, tie_word_embeddings=True),
    Gemma2Config(**SIZES, final_logit_softcapping=0.5),
    Gemma3TextConfig(**SIZES, final_logit_softcapping=0.5),
    GraniteConfig(**SIZES, logits_scaling=8.0),
    CohereConfig(**SIZES, logit_scale=0.0625),
    # Phi's output layer has a bias.
    PhiConfig(**SIZES),
]


def make(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Weights as large as trained ones, so that a cap left out can be seen.
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@torch.no_grad()
def test_the_head_gives_the_models_own_logits(config: PreTrainedConfig) -> None:
    model = make(config)
    tokens = torch.randint(0, 96, (1, 9))
    hidden = backbone_of(model)(input_ids=tokens).last_hidden_state[0]
    torch.testing.assert_close(head_of(model).logits(hidden), model(input_ids=tokens).logits[0], atol=1e-5, rtol=1e-5)
    assert verify_head(model) < 1e-5


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        (FalconH1Config(lm_head_multiplier=0.25), 0.25, None),
        (RecurrentGemmaConfig(logits_soft_cap=30.0), 1.0, 30.0),
        (SimpleNamespace(model_type="hyperclovax", logits_scaling=0.5), 0.5, None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_larger_architectures_do_to_logits_is_read_from_their_config(
    config: PreTrainedConfig, scale: float, softcap: float | None
) -> None:
    model = tiny.llama()
    model.config = config
    assert (head_of(model).scale, head_of(model).softcap) == (scale, softcap)


@pytest.mark.parametrize("config", CONFIGS[2:6], ids=lambda config: config.model_type)
def test_a_scale_or_cap_that_is_not_known_is_found_out(config: PreTrainedConfig) -> None:
    model = make(config)
    names = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    # Cohere copies its scale from the config when it is built; the others read theirs in each forward.
    original = model.config
    hidden_from_us = SimpleNamespace(**{key: value for key, value in original.to_dict().items() if key not in names})
    hidden_from_us.model_type = original.model_type

    class Unknown(type(model)):
        def forward(self, *args: object, **kwargs: object) -> object:
            self.config, seen = original, self.config
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.config = seen

    model.__class__ = Unknown
    model.config = hidden_from_us
    with pytest.raises(ConfigError, match="changes its logits after the output layer"):
        verify_head(model)


def test_rounding_of_a_bfloat16_model_is_no_difference() -> None:
    assert 0 < verify_head(make(CONFIGS[0]).bfloat16()) < 0.1


def test_verification_leaves_the_mode_as_it_was() -> None:
    model = make(CONFIGS[0]).train()
    verify_head(model)
    assert model.training


def test_under_peft_the_head_and_the_backbone_are_the_adapted_models() -> None:
    model = get_peft_model(make(CONFIGS[0]), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    tokens = torch.arange(9)[None]
    hidden = backbone_of(model)(input_ids=tokens).last_hidden_state
    assert not torch.allclose(hidden, backbone_of(make(CONFIGS[0]))(input_ids=tokens).last_hidden_state, atol=1e-3)
    torch.testing.assert_close(head_of(model).logits(hidden[0]), model(input_ids=tokens).logits[0], atol=1e-5, rtol=0)
    assert verify_head(model) < 1e-5


def test_gradients_through_the_head_reach_the_models_weight() -> None:
    model = make(CONFIGS[0])
    assert head_of(model).weight is model.lm_head.weight


@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_adapters_on_the_output_layer_are_refused(where: str) -> None:
    settings = {"target_modules": ["q_proj"]} | {where: ["lm_head"]}
    model = get_peft_model(make(CONFIGS[0]), LoraConfig(**settings))
    with pytest.raises(ConfigError, match="leave it out of the adapters' target_modules"):
        head_of(model)


def test_a_model_without_a_backbone_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no part that gives hidden states"):
        backbone_of(torch.nn.Linear(2, 2))
