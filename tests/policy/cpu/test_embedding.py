"""Tied embeddings add to the head's gradient: the gradients are autograd's, without a second matrix."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny import llama, tokenizer
from tiny_models import SIZES, attention_configs, build
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma3TextConfig, LlamaConfig

from vpd.config import ModelSettings
from vpd.policy.cpu.embedding import TiedEmbedding, fuse_embedding
from vpd.policy.prepare import prepare_policy

# Repeated ones, and one that is padding, whose row learns from the head alone.
TOKENS = torch.tensor([[5, 7, 5, SIZES["pad_token_id"]], [9, 5, 30, 7]])


@pytest.fixture
def plain():
    return build(LlamaConfig(**SIZES, tie_word_embeddings=True))


@pytest.fixture
def fused(plain):
    model = copy.deepcopy(plain)
    assert fuse_embedding(model)
    return model


def gradient(model, loss_of, passes: int = 1) -> torch.Tensor:
    model.zero_grad()
    for _ in range(passes):
        loss_of(model).backward()
    weight = model.get_input_embeddings().weight
    assert weight.grad is not None
    return weight.grad.clone()


def of_both(model):
    return model(TOKENS).logits.log_softmax(-1)[..., 3].sum()


def of_the_embedding(model):
    return model.model(TOKENS).last_hidden_state[..., 0].sum()


def of_an_empty_batch(model):
    """As :meth:`vpd.policy.module.PolicyModule.compute` has it: one number for all of the head."""
    return of_the_embedding(model) + 2.0 * model.lm_head.weight.sum()


def of_the_head(model):
    return model.lm_head(torch.ones(3, SIZES["hidden_size"])).square().sum()


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("loss_of", [of_both, of_the_embedding, of_an_empty_batch, of_the_head])
def test_gradients_are_those_of_autograd(plain, fused, loss_of, passes):
    torch.testing.assert_close(gradient(fused, loss_of, passes), gradient(plain, loss_of, passes))
    # Nothing is left for the next pass.
    torch.testing.assert_close(gradient(fused, of_the_head), gradient(plain, of_the_head))


def test_outputs_are_the_same_to_the_bit(plain, fused):
    with torch.no_grad():
        torch.testing.assert_close(fused(TOKENS).logits, plain(TOKENS).logits, rtol=0, atol=0)
    torch.testing.assert_close(fused(TOKENS).logits, plain(TOKENS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_learn_as_the_model_does(plain, fused, how):
    found = how(fused)
    torch.testing.assert_close(gradient(found, of_both), gradient(plain, of_both))
    # Their own weights, and theirs alone.
    assert fused.get_input_embeddings().weight.grad is None


def test_a_weight_that_takes_another_ones_place_gets_its_gradient(plain, fused):
    weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    fused.model.embed_tokens.weight = fused.lm_head.weight = weight
    torch.testing.assert_close(gradient(fused, of_both), gradient(plain, of_both))


def test_a_pass_that_fails_leaves_nothing_behind(plain, fused):
    def fail(given, taken):
        raise RuntimeError("on purpose")

    output = fused.get_input_embeddings()(TOKENS)
    # Between the embedding's turn and the weight's.
    output.grad_fn.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        output.sum().backward()
    torch.testing.assert_close(gradient(fused, of_both), gradient(plain, of_both))


class _Given(torch.autograd.Function):
    """A head's gradients that are there already, and given away, as the losses have it."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.gradients = [torch.ones_like(hidden), torch.ones_like(weight)]
        return hidden.sum()

    @staticmethod
    def backward(ctx, grad):
        gradients, ctx.gradients = ctx.gradients, None
        return tuple(gradients)


@pytest.mark.parametrize("is_fused", [True, False])
def test_the_embedding_makes_no_matrix(is_fused):
    model = build(LlamaConfig(**SIZES | {"vocab_size": 4096}, tie_word_embeddings=True))
    assert not is_fused or fuse_embedding(model)
    loss = _Given.apply(model.get_input_embeddings()(TOKENS), model.lm_head.weight)
    # Not by a dispatch mode, under which autograd adds nothing in place.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss.backward()
    largest = max(event.self_cpu_memory_usage for event in profiled.key_averages())
    assert (largest < model.lm_head.weight.nbytes) is is_fused


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(attention_configs()["llama"], id="untied"),
        pytest.param(Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8), id="scaled"),
    ],
)
def test_embeddings_that_compute_something_else_stay(config):
    assert not fuse_embedding(build(config))


@pytest.mark.parametrize("change", ["frozen", "bfloat16", "hooked", "max_norm", "sparse", "scale_grad_by_freq"])
def test_embeddings_with_other_gradients_stay(plain, change):
    embedding = plain.get_input_embeddings()
    if change == "frozen":
        embedding.weight.requires_grad_(False)
    elif change == "bfloat16":
        plain.to(torch.bfloat16)
    elif change == "hooked":
        embedding.weight.register_hook(lambda grad: grad * 2.0)
    else:
        setattr(embedding, change, 1.0 if change == "max_norm" else True)
    assert not fuse_embedding(plain)
    assert plain.get_input_embeddings() is embedding


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_policy_is_prepared_with_it_unless_its_layers_are_left_alone(is_fused):
    policy, _ = prepare_policy(llama(), tokenizer(), ModelSettings(fused_layers=is_fused))
    assert isinstance(policy.model.get_input_embeddings(), TiedEmbedding) is is_fused


def test_a_copy_with_frozen_weights_computes_and_may_learn_later(plain, fused):
    """As the one that samples is made."""
    weights = {id(weight): torch.nn.Parameter(weight.clone(), requires_grad=False) for weight in fused.parameters()}
    frozen = copy.deepcopy(fused, weights)
    torch.testing.assert_close(frozen(TOKENS).logits, fused(TOKENS).logits, rtol=0, atol=0)
    torch.testing.assert_close(gradient(frozen.requires_grad_(), of_both), gradient(plain, of_both))
