"""Training passes that recompute instead of keeping give the same gradients, and hold less."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import llama, tokenizer
from tiny_models import attention_configs, build, logits_and_gradients
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from vpd.config import ModelSettings, VPDConfig
from vpd.packing import pack
from vpd.policy.cpu import recompute
from vpd.policy.cpu.mlp import fuse_mlps
from vpd.policy.cpu.norms import fuse_norms
from vpd.policy.objectives import TokenLogProbs
from vpd.policy.prepare import make_accelerator, prepare_policy

NAMES = ["llama", "qwen3", "mistral", "olmo3"]


@pytest.fixture
def fused(request):
    model = build(attention_configs()[getattr(request, "param", "llama")])
    fuse_norms(model)
    fuse_mlps(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                # Fresh ones are all 1.
                weight.copy_(torch.linspace(0.5, 1.5, weight.numel()))
    return model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fused", NAMES, indirect=True)
def test_values_and_gradients_are_the_same_to_the_bit(fused, autocast):
    expected = logits_and_gradients(copy.deepcopy(fused), autocast)
    with recompute():
        found = logits_and_gradients(fused, autocast)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


class _Casts(TorchDispatchMode):
    """Notes the matrices that are cast to bfloat16 while it is entered."""

    def __init__(self):
        super().__init__()
        self.made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dim() == 2 and result.dtype == torch.bfloat16:
            self.made.append(StorageWeakRef(result.untyped_storage()))
        return result


def held_after_forward(model, recomputes: bool) -> dict[str, int]:
    """How many of the norms' outputs, the MLPs' insides and the weights' casts are still there after a forward pass."""
    noted: dict[str, list[StorageWeakRef]] = {"norms": [], "mlps": []}

    def note(name):
        return lambda module, inputs: noted[name].append(StorageWeakRef(inputs[0].untyped_storage()))

    hooks = [layer.self_attn.q_proj.register_forward_pre_hook(note("norms")) for layer in model.model.layers]
    hooks += [layer.mlp.up_proj.register_forward_pre_hook(note("norms")) for layer in model.model.layers]
    hooks += [layer.mlp.down_proj.register_forward_pre_hook(note("mlps")) for layer in model.model.layers]
    casts = _Casts()
    with (
        recompute() if recomputes else nullcontext(),
        casts,
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        hidden = model.model(torch.arange(3, 40)[None]).last_hidden_state
    assert hidden.requires_grad
    for hook in hooks:
        hook.remove()
    noted["casts"] = casts.made
    assert all(noted.values())
    return {name: sum(not reference.expired() for reference in references) for name, references in noted.items()}


def test_what_can_be_recomputed_is_not_held(fused):
    layers = len(fused.model.layers)
    before = held_after_forward(fused, recomputes=False)
    assert before["norms"] == 2 * layers
    assert before["mlps"] == layers
    assert before["casts"] >= 7 * layers
    assert held_after_forward(fused, recomputes=True) == {"norms": 0, "mlps": 0, "casts": 0}


def test_what_was_recomputed_is_not_held_after_its_layer(fused):
    """Of a norm's output and silu(gate) one is there at a time; the graph of a pass may outlive its backward pass."""
    with recompute(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss = fused(torch.arange(3, 40)[None]).logits.float().square().mean()
    seen, nodes, open_nodes = set(), [], [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.append(node)
            open_nodes += [following for following, _ in node.next_functions]
    loss.backward()
    recomputed = [getattr(node, name) for node in nodes for name in ("recomputed", "activated") if hasattr(node, name)]
    assert len(recomputed) == 3 * len(fused.model.layers)
    assert recomputed == [None] * len(recomputed)


def test_a_pass_may_go_backward_twice(fused):
    def gradients(recomputes):
        fused.zero_grad()
        with recompute() if recomputes else nullcontext():
            loss = fused(torch.arange(3, 40)[None]).logits.float().square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        return torch.cat([weight.grad.flatten() for weight in fused.parameters() if weight.grad is not None])

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


def test_a_tensor_that_is_kept_as_a_view_comes_back_as_one():
    weight = torch.randn(4, 3, requires_grad=True)
    x = torch.randn(3, 5, requires_grad=True)
    with recompute():
        # A slice of a transposed cast: neither its shape, its strides nor its beginning are the cast's.
        output = x.bfloat16().T @ weight.bfloat16().T[:, 1:3]
    output.float().square().sum().backward()
    expected = x.detach().bfloat16().T @ weight.detach().bfloat16().T[:, 1:3]
    rounded = (2 * expected.float()).bfloat16()
    torch.testing.assert_close(x.grad, (weight.detach().bfloat16().T[:, 1:3] @ rounded.T).float())


def test_a_weight_that_is_changed_before_the_backward_pass_is_an_error():
    weight, x = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    with recompute(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        output = torch.nn.functional.linear(x, weight)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        output.sum().backward()


def test_a_tensor_that_is_changed_before_the_backward_pass_is_an_error():
    x = torch.randn(5, 3, requires_grad=True) * 1
    with recompute():
        output = x * x
    with torch.no_grad():
        x.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        output.sum().backward()


@pytest.mark.parametrize("wanted", [True, False])
def test_nobody_else_keeps_casts(tmp_path, wanted):
    """With a cache of casts autocast would hold the copy of the network that the backward pass can do without."""
    config = VPDConfig.from_overrides(
        [
            f"model.fused_layers={str(wanted).lower()}",
            'model.autocast="bfloat16"',
            f'run.output_dir="{tmp_path}"',
        ]
    )
    # A process has one mixed precision, which other tests may have set.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with make_accelerator(config).autocast():
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_cache_enabled() is not wanted
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_prepared_policy_recomputes_where_layers_are_fused(monkeypatch, wanted):
    policy, _ = prepare_policy(llama(), tokenizer(), ModelSettings(fused_layers=wanted))
    entered = []
    monkeypatch.setattr("vpd.policy.module.recompute", lambda: (entered.append(True), recompute())[1])
    batch = pack([[3, 4, 5, 6], [3, 4, 7]], [2, 2])
    policy(batch, TokenLogProbs(1.0))
    assert len(entered) == wanted
    with torch.no_grad():
        policy(batch, TokenLogProbs(1.0))
    assert len(entered) == wanted
