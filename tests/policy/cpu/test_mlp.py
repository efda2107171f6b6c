"""Gated MLPs that keep one tensor less compute the same, and replace the right modules."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import attention_configs, build, logits_and_gradients
from torch import nn

from vpd.policy.cpu.mlp import GatedMLP, fuse_mlps, gated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_autograd(dtype):
    gate, up, grad = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    found, expected = (
        (output.detach(), *torch.autograd.grad(output, inputs, grad))
        for compute in (gated, lambda gate, up: nn.functional.silu(gate) * up)
        for inputs in [[gate.clone().requires_grad_(), up.clone().requires_grad_()]]
        for output in [compute(*inputs)]
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_gradient_that_came_in_is_left_as_it_was():
    gate, up, grad = (torch.randn(4, 8) for _ in range(3))
    before = grad.clone()
    torch.autograd.grad(gated(gate.requires_grad_(), up.requires_grad_()), (gate, up), grad)
    torch.testing.assert_close(grad, before)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "olmo3"])
def test_a_model_computes_what_it_did(name, autocast):
    plain = build(attention_configs()[name])
    fused = copy.deepcopy(plain)
    assert fuse_mlps(fused) == len(fused.model.layers)
    # A deep copy, as the network that samples is one, computes with its own weights.
    for model in (fused, copy.deepcopy(fused)):
        for ours, theirs in zip(
            logits_and_gradients(model, autocast), logits_and_gradients(plain, autocast), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_one_tensor_less_is_kept():
    model = build(attention_configs()["llama"])
    inside = model.model.layers[0].mlp.gate_proj.out_features

    def kept() -> set[int]:
        seen, mlp = set(), model.model.layers[0].mlp

        def note(tensor):
            if tensor.shape[-1] == inside and tensor.dim() == 3:
                seen.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = mlp(torch.randn(1, 5, mlp.gate_proj.in_features, requires_grad=True))
        assert output.requires_grad
        return seen

    before = len(kept())
    fuse_mlps(model)
    assert len(kept()) == before - 1


class _Scaled(nn.Module):
    """A gated MLP that computes something else."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x):
        return 1.01 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _Clamped(_Scaled):
    """One that does so where numbers are large."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=100.0) * self.up_proj(x))


class _Dropping(_Scaled):
    """One that does so in training."""

    def forward(self, x):
        return nn.functional.dropout(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), 0.1)


class _Other(_Scaled):
    """One that does so in evaluation."""

    def forward(self, x):
        return (1.0 if self.training else 1.01) * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("kind", [_Scaled, _Clamped, _Dropping, _Other])
def test_what_computes_something_else_for_some_numbers_or_in_one_mode_stays(kind):
    model = build(attention_configs()["llama"])
    layers = model.model.layers
    for layer in layers[1:]:
        layer.mlp = kind(layer.mlp)
    state, modes = torch.get_rng_state(), {name: module.training for name, module in model.named_modules()}
    assert fuse_mlps(model) == 1
    assert torch.equal(torch.get_rng_state(), state)
    after = {name: module.training for name, module in model.named_modules()}
    assert all(after[name] == modes[name] for name in after)


@pytest.mark.filterwarnings("ignore:Accessing `tie_word_embeddings`")
def test_adapters_with_dropout_of_their_own_are_no_reason_to_stay():
    model = build(attention_configs()["llama"])
    lora = LoraConfig(r=2, target_modules=["up_proj", "down_proj"], lora_dropout=0.5, init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    names = [name for name, _ in adapted.named_parameters()]
    assert fuse_mlps(adapted) == len(model.model.layers)
    assert [name for name, _ in adapted.named_parameters()] == names


def test_what_computes_something_else_stays():
    # Gemma's activation is another.
    assert fuse_mlps(build(attention_configs()["gemma3"])) == 0
    model = build(attention_configs()["llama"])
    layers = model.model.layers
    layers[0].mlp = _Scaled(layers[0].mlp)
    layers[1].mlp.forward = layers[1].mlp.forward
    assert fuse_mlps(model) == len(layers) - 2
    assert [type(layer.mlp) is GatedMLP for layer in layers] == [False, False, True]
    # Once is enough.
    assert fuse_mlps(model) == 0


def test_what_others_have_hooked_stays():
    model = build(attention_configs()["llama"])
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: None)
    assert fuse_mlps(model) == len(model.model.layers) - 1
