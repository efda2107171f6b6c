"""The right architectures may be packed, and a run finds out about the others."""

import pytest
import torch
from tiny_models import WINDOW, attention_configs, build, grouped_sequences, hybrid_config
from transformers import (
    BloomConfig,
    FalconH1Config,
    Gemma2Config,
    GptOssConfig,
    Llama4TextConfig,
    MambaConfig,
    Qwen2MoeConfig,
    RwkvConfig,
)

from vpd.packing import check_packed_equals_separate, enable_packed_attention, hidden_states, pack, packable

CONFIGS = attention_configs()


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_only_models_are_packable(name):
    assert packable(CONFIGS[name]) == (True, "")
    assert packable(build(CONFIGS[name])) == (True, "")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hybrid_config(), "linear_attention"),
        (MambaConfig(), "linear_attention"),
        (RwkvConfig(), "state"),
        (FalconH1Config(), "hybrid"),
        (Llama4TextConfig(), "chunked_attention"),
        (Gemma2Config(), "attn_logit_softcapping"),
        (GptOssConfig(), "_supports_sdpa"),
        (BloomConfig(), "_supports_sdpa"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_the_others_are_named_with_a_reason(config, reason):
    answer, sentence = packable(config)
    assert not answer
    assert reason in sentence


@pytest.mark.parametrize("name", CONFIGS)
def test_the_check_passes_for_a_packable_model(name):
    model = build(CONFIGS[name])
    enable_packed_attention(model)
    assert check_packed_equals_separate(model.model, *grouped_sequences()).relative < 1e-5


def test_the_check_finds_state_that_no_configuration_names():
    model = build(CONFIGS["llama"])
    enable_packed_attention(model)
    # Each token's embedding leaks into the next one's, as a convolution would do.
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output + output.roll(1, dims=1))
    model.train()
    assert check_packed_equals_separate(model.model, *grouped_sequences()).relative > 0.01
    assert model.model.training


def test_a_window_that_the_layer_keeps_to_itself_is_refused():
    config = Qwen2MoeConfig(
        **{key: getattr(CONFIGS["llama"], key) for key in ("vocab_size", "hidden_size", "num_attention_heads")},
        num_key_value_heads=2,
        num_hidden_layers=2,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = build(config)
    enable_packed_attention(model)
    with pytest.raises(ValueError, match="sliding window"):
        check_packed_equals_separate(model.model, *grouped_sequences())


def test_a_hybrid_runs_row_by_row_as_separately():
    sequences, starts = (column[2:5] for column in grouped_sequences())
    model = build(hybrid_config())
    assert not packable(model)[0]
    batch = pack(sequences, starts, share_prefixes=False)
    with torch.no_grad():
        rows = hidden_states(model.model, batch)[batch.predictor]
        separate = torch.cat(
            [
                model.model(input_ids=torch.tensor([sequence])).last_hidden_state[0, start - 1 : -1]
                for sequence, start in zip(sequences, starts, strict=True)
            ]
        )
    # The last token is left out of a row; the linear layers' chunked scan then rounds differently.
    torch.testing.assert_close(rows, separate, rtol=1e-5, atol=1e-5)
