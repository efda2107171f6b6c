"""Tiny models and a tokenizer that need no hub."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # Weights this large make the next-token distribution of a random model far from uniform.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, **SHAPE))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, **SHAPE))


def gemma3() -> PreTrainedModel:
    """Its sliding window is shorter than the prompts and completions of the tests."""
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(num_hidden_layers=3, layer_types=layers, sliding_window=6, **SHAPE)
    return Gemma3ForCausalLM(config)


def gpt_neo() -> PreTrainedModel:
    """Its local layer counts a window in places of the cache, and nothing in its config's usual fields says so."""
    config = GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["local", "global"], 1]],
        window_size=12,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return GPTNeoForCausalLM(config)


def mpt() -> PreTrainedModel:
    """Its attention falls off with the distance in places of the cache."""
    return MptForCausalLM(MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, initializer_range=0.3))


def qwen3_next() -> PreTrainedModel:
    """Carries a state across tokens in its first layer."""
    config = Qwen3NextConfig(
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **SHAPE,
    )
    return Qwen3NextForCausalLM(config)


def deepseek_v3() -> PreTrainedModel:
    """Its cache holds less than its attention reads."""
    config = DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4, "head_dim": 4},
        num_hidden_layers=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    return DeepseekV3ForCausalLM(config)


def nemotron() -> PreTrainedModel:
    """Drops keywords on the way to its attention."""
    return NemotronForCausalLM(NemotronConfig(num_hidden_layers=2, **SHAPE))


def doge() -> PreTrainedModel:
    """Its mask is made of the values in the cache."""
    return DogeForCausalLM(DogeConfig(num_hidden_layers=2, **SHAPE))


def gemma3n() -> PreTrainedModel:
    """Its last layers read the cache of others."""
    config = Gemma3nTextConfig(
        **{**SHAPE, "intermediate_size": [48] * 4},
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=6,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return Gemma3nForCausalLM(config)


MODELS = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "gpt_neo": gpt_neo,
    "mpt": mpt,
    "qwen3_next": qwen3_next,
    "deepseek_v3": deepseek_v3,
    "nemotron": nemotron,
    "doge": doge,
    "gemma3n": gemma3n,
}


@pytest.fixture
def make_model() -> Callable[[str], PreTrainedModel]:
    """Builds the named tiny model with fixed random weights, in training mode."""

    def make(name: str) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MODELS[name]().train()

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that a character outside ASCII takes several tokens; token 3 + i is the i-th byte symbol."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
