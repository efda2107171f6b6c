"""Decoding hands the kernel the query heads of a key head as rows, and gets what transformers' attention gives."""

import pytest
import torch
import torch.nn.functional as F
from engines import generate
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vpd.rollout import LocalEngine
from vpd.rollout.decode_attention import rollout_attention_forward

B, HEADS, KEY_HEADS, T, D = 3, 6, 2, 11, 8


def layer(key_heads: int = KEY_HEADS) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups = HEADS // key_heads
    module.is_causal = True
    return module


def states(queries: int, key_heads: int = KEY_HEADS, width: int = D) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (B, HEADS, queries, D), (B, key_heads, T, D), (B, key_heads, T, width)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


# With values of the keys' width transformers leaves the heads to the kernel, with others it makes rows of them.
@pytest.mark.parametrize("width", [D, D + 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize(
    ("queries", "key_heads", "masked"), [(1, 2, False), (1, 6, False), (1, 2, True), (T, 2, False)]
)
def test_gives_what_transformers_gives(queries, key_heads, masked, scaling, dtype, width):
    given = [state.to(dtype) for state in states(queries, key_heads, width)]
    mask = torch.rand(B, 1, queries, T, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    expected, _ = sdpa_attention_forward(layer(key_heads), *given, mask, scaling=scaling)
    found, weights = rollout_attention_forward(layer(key_heads), *given, mask, scaling=scaling)
    assert weights is None
    torch.testing.assert_close(found, expected)


def test_what_it_does_not_compute_is_left_to_transformers():
    with pytest.raises(ValueError, match="softcap"):
        rollout_attention_forward(layer(), *states(1), None, softcap=1.0)


def test_a_step_of_decoding_without_padding_is_computed_in_rows(make_model, tokenizer, monkeypatch):
    shapes = []
    attend = F.scaled_dot_product_attention

    def watched(query, key, *args, **kwargs):
        shapes.append((tuple(query.shape[1:3]), kwargs.get("enable_gqa", False)))
        return attend(query, key, *args, **kwargs)

    engine = LocalEngine(make_model("llama"), tokenizer, dtype="float32")
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    generate(engine, [[5, 6, 7], [8, 9, 10]], max_new_tokens=3, eos_token_ids=())
    # Two layers: the prompts, packed in one block, then two steps with 2 key heads of 2 query heads each.
    assert shapes == [((2, 12), False)] * 2 + [((2, 2), False)] * 4
