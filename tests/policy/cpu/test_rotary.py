"""Fused rotary positions give transformers' numbers and gradients, and replace the right functions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import SIZES, attention_configs, build, logits_and_gradients
from transformers import CohereConfig, GPT2Config, Phi3Config
from transformers.models.llama import modeling_llama

from vpd.policy.cpu import rotary
from vpd.policy.cpu.rotary import fuse_rotary, rotate

_FUSED = {"llama": 3, "qwen3": 3, "mistral": 3, "olmo3": 3, "gemma3": 3, "phi3": 3, "cohere": 0, "gpt2": 0}


def _inputs(dtype=torch.float32, batch=2, positions=2):
    """Queries as projections give them, and cosines and sines whose halves differ."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 37, 6, 16, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(2, positions, 37, 16, generator=generator)
    return x, cos, sin


@pytest.mark.parametrize("tokens", [1, 5, 2**10])
@pytest.mark.parametrize("positions", [1, 2])
def test_values_and_gradients_are_transformers_own(monkeypatch, tokens, positions):
    monkeypatch.setattr(rotary, "TILE_NUMBERS", tokens * 6 * 16 // torch.get_num_threads())
    x, cos, sin = _inputs(positions=positions)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for compute in (lambda x: modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0], lambda x: rotate(x, cos, sin)):
        result = compute(x)
        found.append((result.detach(), *torch.autograd.grad(result, x, upstream)))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_gets_what_attention_would_have_rounded_to():
    x, cos, sin = _inputs(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = rotate(x, cos, sin)
    theirs = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0]
    assert ours.dtype == torch.bfloat16
    assert theirs.dtype == torch.float32
    # Sums may differ in float32's last bit, and so may one that lies between two numbers of bfloat16.
    assert (ours != theirs.bfloat16()).float().mean() < 1e-3
    torch.testing.assert_close(ours, theirs.bfloat16(), rtol=2**-7, atol=1e-6)
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize(("architecture", "count"), _FUSED.items())
@pytest.mark.parametrize("autocast", [False, True])
def test_models_compute_the_same_and_rotations_of_another_kind_stay(architecture, count, autocast):
    # Cohere rotates neighbours; GPT-2 does not rotate; this Phi-3 rotates half of each head, by the function itself.
    others = {"cohere": CohereConfig, "gpt2": GPT2Config, "phi3": Phi3Config}
    config = others[architecture](**SIZES) if architecture in others else attention_configs()[architecture]
    if architecture == "phi3":
        config.rope_parameters["partial_rotary_factor"] = 0.5
    model = build(config)
    before = logits_and_gradients(model, autocast)
    assert fuse_rotary(model) == count
    for theirs, ours in zip(before, logits_and_gradients(model, autocast), strict=True):
        assert (ours - theirs).norm() <= (2e-2 if autocast else 1e-5) * theirs.norm()


def test_the_fused_function_is_used_and_other_models_keep_theirs(monkeypatch):
    fused, plain = (build(attention_configs()["llama"]) for _ in range(2))
    fuse_rotary(fused)
    calls = []
    monkeypatch.setattr(rotary, "rotate", lambda *inputs: calls.append(inputs) or rotate(*inputs))
    tokens = torch.arange(3, 20)[None]
    expected = plain(tokens).logits
    assert not calls
    torch.testing.assert_close(fused(tokens).logits, expected)
    assert len(calls) == 2 * 3, "queries and keys of each layer"
    torch.testing.assert_close(copy.deepcopy(fused)(tokens).logits, expected)
    assert len(calls) == 4 * 3
    torch.testing.assert_close(pickle.loads(pickle.dumps(fused))(tokens).logits, expected)
    # In bfloat16 throughout, as transformers computes it.
    half = copy.deepcopy(fused).bfloat16()
    assert torch.equal(half(tokens).logits, copy.deepcopy(plain).bfloat16()(tokens).logits)
    assert len(calls) == 4 * 3


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo3"])
def test_a_model_in_bfloat16_computes_as_before(architecture):
    """OLMo's cosines are in float32 also then, and its function gives what it was given."""
    model = build(attention_configs()[architecture])
    tokens = torch.arange(3, 20)[None]
    expected = copy.deepcopy(model).bfloat16()(tokens).logits
    fuse_rotary(model)
    assert torch.equal(copy.deepcopy(model).bfloat16()(tokens).logits, expected)


def test_the_result_may_be_changed_in_place():
    x, cos, sin = _inputs()
    rotate(x, cos, sin).mul_(2.0).sum().backward()
    doubled, x.grad = x.grad, None
    (2.0 * rotate(x, cos, sin)).sum().backward()
    torch.testing.assert_close(doubled, x.grad)


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    model = build(attention_configs()["llama"])
    layer = model.model.layers[1].self_attn
    own = layer.forward
    layer.forward = lambda *inputs, **kwargs: own(*inputs, **kwargs)
    kept = layer.forward
    assert fuse_rotary(model) == 2
    assert layer.forward is kept


def test_a_function_of_another_kind_is_not_replaced(monkeypatch):
    def scaled(q, k, cos, sin):
        return tuple(1.01 * x for x in theirs(q, k, cos, sin))

    theirs = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", scaled)
    assert fuse_rotary(build(attention_configs()["llama"])) == 0
