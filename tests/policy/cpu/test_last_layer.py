"""A trimmed last layer gives scored tokens the same states, keys and gradients, and leaves the rest out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SIZES, attention_configs, build, grouped_sequences
from torch import nn
from transformers import GPT2Config, MixtralConfig

from vpd.packing import enable_packed_attention, hidden_states, pack
from vpd.policy.cpu.last_layer import trim_last_layer

CONFIGS = attention_configs()
_OTHERS = {"mixtral": MixtralConfig, "gpt2": GPT2Config}


def _packed(name):
    model = build(CONFIGS[name])
    enable_packed_attention(model)
    return model


def _states(model, batch):
    return hidden_states(model.model, batch)[batch.predictor]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_scored_states_and_gradients_are_those_of_the_whole_layer(name, checkpointing):
    """This also holds for a batch that is conditioned on another one, whose keys and values it reuses."""
    sequences, starts = grouped_sequences()
    plain = _packed(name)
    trimmed = copy.deepcopy(plain)
    assert trim_last_layer(trimmed)
    found = []
    for model in (plain, trimmed):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        first = pack(sequences, starts, keeps_keys=True)
        states = _states(model, first)
        with torch.no_grad():
            conditioned = _states(model, pack([[*x[:-1], 7, *x[-1:]] for x in sequences], starts, conditioned_on=first))
        first.layout.forget()
        weights = [weight for weight in model.model.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(states.square().sum(), weights, allow_unused=True)
        found.append([states.detach(), conditioned, *(g for g in gradients if g is not None)])
    assert len(found[0]) == len(found[1])
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_parts_of_the_last_layer_see_the_scored_tokens_alone_and_only_in_packed_batches():
    model = _packed("llama")
    trim_last_layer(model)
    seen: dict[str, list[int]] = {}
    for layer in (model.model.layers[0], model.model.layers[-1]):
        for part in ("q_proj", "k_proj", "o_proj"):
            module: nn.Linear = layer.self_attn.get_submodule(part)
            compute = type(module).forward

            def counted(self, x, compute=compute, name=f"{layer.self_attn.layer_idx} {part}"):
                seen.setdefault(name, []).append(x.shape[1])
                return compute(self, x)

            module.__class__ = type(part, (nn.Linear,), {"forward": counted})
    batch = pack(*grouped_sequences())
    scored = len(batch.predictor.unique())
    assert scored < batch.token_count
    hidden_states(model.model, batch)
    model.model(batch.input_ids[None])

    whole = [batch.token_count] * 2
    assert seen == {
        **{f"0 {part}": whole for part in ("q_proj", "k_proj", "o_proj")},
        "2 q_proj": [scored, batch.token_count],
        "2 k_proj": whole,
        "2 o_proj": [scored, batch.token_count],
    }


def test_a_pass_that_fails_leaves_nothing_behind():
    model = _packed("llama")
    trim_last_layer(model)
    batch = pack(*grouped_sequences())
    tokens = batch.input_ids[None]
    expected = model.model(tokens).last_hidden_state
    norm = model.model.layers[-1].post_attention_layernorm
    hook = norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden_states(model.model, batch)
    hook.remove()
    assert torch.equal(model.model(tokens).last_hidden_state, expected)


def test_copies_and_pickled_models_are_trimmed_or_whole_but_the_same_where_it_counts():
    model = _packed("llama")
    trim_last_layer(model)
    batch = pack(*grouped_sequences())
    expected = _states(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(_states(other, batch), expected)
        assert not hidden_states(other.model, batch).isnan().any()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_of_the_last_layer_learn_as_before(dropout):
    """Dropout draws its numbers in another order where fewer tokens pass; without it all is equal."""
    targets = ["q_proj", "k_proj", "o_proj", "down_proj"]
    batch = pack(*grouped_sequences())
    found = []
    for trims in (False, True):
        torch.manual_seed(0)
        base = _packed("llama")
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules=targets, lora_dropout=dropout))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        assert not trims or trim_last_layer(adapted)
        adapted.train()
        _states(base, batch).square().sum().backward()
        found.append([p.grad for p in adapted.parameters() if p.requires_grad])
    for theirs, ours in zip(*found, strict=True):
        assert ours.abs().sum() > 0
        if not dropout:
            torch.testing.assert_close(ours, theirs)


class _Pair(nn.Module):
    """An MLP that gives more than a tensor, or looks at the tokens before."""

    def __init__(self, mlp, gives_two):
        super().__init__()
        self.mlp, self.gives_two = mlp, gives_two

    def forward(self, x):
        return (self.mlp(x), x) if self.gives_two else self.mlp(x.cumsum(1))


@pytest.mark.parametrize("gives_two", [False, True])
def test_a_layer_whose_mlp_is_of_another_kind_stays(gives_two):
    model = build(CONFIGS["llama"])
    model.model.layers[-1].mlp = _Pair(model.model.layers[-1].mlp, gives_two)
    model.train()
    assert not trim_last_layer(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", _OTHERS)
def test_layers_of_experts_and_of_another_build_stay(name):
    assert not trim_last_layer(build(_OTHERS[name](**SIZES)))


def test_a_layer_that_is_used_twice_stays():
    model = build(CONFIGS["llama"])
    model.model.layers[0] = model.model.layers[-1]
    assert not trim_last_layer(model)


def test_once_is_enough():
    model = _packed("llama")
    expected = _states(model, pack(*grouped_sequences()))
    assert trim_last_layer(model) == 1
    assert trim_last_layer(model) == 0
    torch.testing.assert_close(_states(model, pack(*grouped_sequences())), expected)
