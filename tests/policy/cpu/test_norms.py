"""Fused norms give transformers' numbers, gradients and roundings under autocast, and replace the right modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import SIZES, attention_configs, build, logits_and_gradients
from toy import toy_trainer
from transformers import GemmaConfig, MiniMaxConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vpd.policy.architecture import causal_lm_of
from vpd.policy.cpu import norms
from vpd.policy.cpu.norms import TiledRMSNorm, fuse_norms, rms_norm
from vpd.runs.folder import read_metrics

_FUSED = {
    "llama": 6,
    "qwen3": 6,
    "mistral": 6,
    "olmo3": 0,
    "gemma3": 0,
    "gemma": 0,
    "mixtral": 0,
    "minimax": 0,
}


def _pair(width: int) -> tuple[LlamaRMSNorm, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    norm = LlamaRMSNorm(width, eps=1e-5)
    norm.weight.data = 0.5 + torch.rand(width, generator=generator)
    return norm, torch.randn(2, 37, width, generator=generator) * torch.logspace(-3, 2, 37)[:, None]


@pytest.mark.parametrize("width", [8, 96])
@pytest.mark.parametrize("tile", [1, 2**20])
def test_values_and_gradients_are_transformers_own(monkeypatch, width, tile):
    monkeypatch.setattr(norms, "TILE_NUMBERS", tile * width)
    norm, x = _pair(width)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for compute in (norm, lambda x: rms_norm(x, norm.weight, norm.variance_epsilon)):
        given = x.clone().requires_grad_()
        norm.zero_grad()
        result = compute(given)
        result.backward(upstream)
        assert given.grad is not None
        assert norm.weight.grad is not None
        found.append((result.detach(), given.grad, norm.weight.grad.clone()))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5 * theirs.abs().max().item())


def test_gradients_agree_with_differences():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))


def test_the_result_may_be_changed_in_place():
    norm, x = _pair(8)
    x.requires_grad_()
    rms_norm(x, norm.weight, 1e-5).mul_(2.0).sum().backward()
    doubled = x.grad
    x.grad = None
    (2.0 * rms_norm(x, norm.weight, 1e-5)).sum().backward()
    torch.testing.assert_close(doubled, x.grad)


def test_a_frozen_weight_gets_no_gradient():
    norm, x = _pair(8)
    norm.requires_grad_(False)
    x.requires_grad_()
    rms_norm(x, norm.weight, 1e-5).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None


def test_autocast_gets_what_the_projections_would_have_rounded_to():
    norm, x = _pair(96)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = rms_norm(x, norm.weight, 1e-5), norm(x).bfloat16()
    assert ours.dtype == torch.bfloat16
    # The mean square may differ in its last bit, and so may a value that lies between two.
    assert (ours != theirs).float().mean() < 1e-3
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)


@pytest.mark.parametrize(("architecture", "count"), _FUSED.items())
@pytest.mark.parametrize("autocast", [False, True])
def test_models_compute_the_same_and_norms_of_another_kind_stay(architecture, count, autocast):
    # Gemma's weights count from 1, in layers like Llama's; layers of experts read their norms in other ways too.
    others = {"gemma": GemmaConfig, "mixtral": MixtralConfig, "minimax": MiniMaxConfig}
    config = others[architecture](**SIZES) if architecture in others else attention_configs()[architecture]
    model = build(config)
    before = logits_and_gradients(model, autocast)
    assert fuse_norms(model) == count
    for theirs, ours in zip(before, logits_and_gradients(model, autocast), strict=True):
        tolerance = 2e-2 if autocast else 1e-5
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_a_copy_has_weights_of_its_own_and_samples_as_before():
    model = build(attention_configs()["llama"])
    tokens = torch.arange(3, 20)[None]
    plain = copy.deepcopy(model).bfloat16()(tokens).logits
    fuse_norms(model)
    original = model(tokens).logits
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        layer.input_layernorm.weight.data.mul_(2.0)
    assert torch.equal(model(tokens).logits, original)
    assert not torch.allclose(other(tokens).logits, original)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(tokens).logits, original)
    # In bfloat16 throughout, as transformers computes it.
    assert torch.equal(copy.deepcopy(model).bfloat16()(tokens).logits, plain)


def test_a_copy_that_samples_goes_over_its_rows_in_tiles_with_the_same_numbers(monkeypatch):
    norm, x = _pair(96)
    expected = norm.bfloat16()(x.bfloat16())
    seen, compute = [], norms.plain_rms_norm
    monkeypatch.setattr(norms, "plain_rms_norm", lambda x, *rest: (seen.append(x.shape[0]), compute(x, *rest))[1])
    monkeypatch.setattr(norms, "TILE_NUMBERS", 10 * 96 // torch.get_num_threads())
    tiled = TiledRMSNorm(norm)
    with torch.no_grad():
        found = tiled(x.bfloat16())
    assert torch.equal(found, expected)
    assert sum(seen) == 74
    assert 1 < len(seen) <= 74
    whole = tiled(x.bfloat16())
    assert seen[-1] == 2, "with a gradient it is transformers' own, all at once"
    assert whole.requires_grad
    assert torch.equal(whole, expected)


def test_a_norm_that_treats_eps_otherwise_is_not_taken_for_a_plain_one():
    class Clamped(LlamaRMSNorm):
        def forward(self, hidden_states):
            return self.weight * hidden_states * hidden_states.square().mean(-1, True).clamp_min(1e-5).rsqrt()

    model = build(attention_configs()["llama"])
    for layer in model.model.layers:
        layer.input_layernorm = Clamped(32, eps=1e-5)
    assert fuse_norms(model) == 3


def test_a_norm_that_rounds_otherwise_in_bfloat16_is_not_taken_for_a_plain_one():
    class Wide(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states.float()).to(hidden_states.dtype)

    model = build(attention_configs()["llama"])
    for layer in model.model.layers:
        layer.input_layernorm = Wide(32, eps=1e-5)
        torch.nn.init.uniform_(layer.input_layernorm.weight, 0.5, 1.5)
    assert fuse_norms(model) == 3


def test_norms_that_others_have_hooked_or_that_were_replaced_stay():
    model = build(attention_configs()["llama"])
    model.model.layers[0].input_layernorm.register_forward_hook(lambda module, inputs, output: None)
    names = [name for name, _ in model.named_parameters()]
    assert fuse_norms(model) == 5
    assert fuse_norms(model) == 0
    assert [name for name, _ in model.named_parameters()] == names


def test_a_run_takes_the_same_course_with_and_without(tmp_path):
    courses = []
    for fused in (True, False):
        trainer = toy_trainer(
            tmp_path / str(fused),
            model={"fused_layers": fused},
            # The divergence of a random model is else near what rounding makes of it.
            rollout={"temperature": 0.2},
            eval={"preflight_tasks": 0, "final_tasks": 0, "eval_on_start": False},
            run={"max_steps": 4},
        )
        assert isinstance(causal_lm_of(trainer.model).model.layers[0].input_layernorm, TiledRMSNorm) is fused
        trainer.train()
        entries = [entry for entry in read_metrics(tmp_path / str(fused)) if entry["event"] == "train"]
        courses.append([(entry["divergence"], entry["grad_norm"], entry["reward"]) for entry in entries])
    assert len(courses[0]) == 4
    for ours, theirs in zip(*courses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
