"""Networks of a few thousand weights, one for each way of attending that packing supports, and sequences for them."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3NextConfig,
)

VOCABULARY = 61
# Shorter than every prompt below, so that a wrong window shows.
WINDOW = 7

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def attention_configs() -> dict[str, PreTrainedConfig]:
    return {
        "llama": LlamaConfig(**SIZES),
        "qwen3": Qwen3Config(**SIZES),
        "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
        "olmo3": Olmo3Config(**SIZES, **_SLIDING),
        "gemma3": Gemma3TextConfig(**SIZES, **_SLIDING, query_pre_attn_scalar=8),
    }


def hybrid_config() -> PreTrainedConfig:
    return Qwen3NextConfig(
        **(SIZES | {"num_hidden_layers": 2}),
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def grouped_sequences() -> tuple[list[list[int]], list[int]]:
    """Two groups under one system message; completions share beginnings, and one of them comes twice."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    system = draw(5)
    sequences, starts = [], []
    for group in range(2):
        prompt = system + draw(9 + group)
        completions = [draw(6), draw(11)]
        completions += [completions[1][:4] + draw(5), completions[0]]
        sequences += [prompt + completion for completion in completions]
        starts += [len(prompt)] * len(completions)
    return sequences, starts


def logits_and_gradients(model: PreTrainedModel, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """On two sequences: the logits [2, 30, V], and the gradient of some of them with respect to all weights, flat."""
    tokens = torch.randint(3, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(tokens).logits.float()
    logits.log_softmax(-1)[..., 5].sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
