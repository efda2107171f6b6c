"""The networks of the benchmark: loaded by name, or of a known shape with random weights.

All random networks go with SmolLM2's tokenizer; tokens beyond its vocabulary decode to nothing.
"""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.step.specs import Precision
from vpd.policy import gguf
from vpd.policy.load import load_policy

SHAPES = {
    "tiny": {"hidden_size": 192, "intermediate_size": 512, "layers": 4, "heads": 3, "key_heads": 1},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "layers": 30, "heads": 9, "key_heads": 3},
    "360m": {"hidden_size": 960, "intermediate_size": 2560, "layers": 32, "heads": 15, "key_heads": 5},
}
"""The shapes of SmolLM2's two smaller sizes, and of a network that is mostly vocabulary."""


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that goes with a network, without the network."""
    if name.startswith("random-") or name == gguf.SMOLLM2:
        name = str(gguf.convert_once(gguf.smollm2_file()))
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def network(name: str, precision: Precision) -> PreTrainedModel:
    """Make the network ``random-SIZE`` or ``random-SIZE-VOCABULARY`` with one of :data:`SHAPES`; load any other."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    if not name.startswith("random-"):
        return load_policy(name, dtype=dtype).model
    size, _, vocabulary = name.removeprefix("random-").partition("-")
    shape = SHAPES[size]
    config = LlamaConfig(
        vocab_size=int(vocabulary or 49152),
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["key_heads"],
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)  # pyright: ignore[reportArgumentType]
    model.config._name_or_path = model.name_or_path = name
    return model
