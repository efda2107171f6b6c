"""Token log-probabilities against dense log-softmax and gather."""

from __future__ import annotations

import pytest
import torch

from vpd.losses import Head, token_log_probs

T, H, V = 11, 5, 16


@pytest.fixture
def dense_log_probs(dense_logits):
    def log_probs(hidden, head, targets, temperature):
        return dense_logits(hidden, head, temperature).log_softmax(-1)[torch.arange(len(targets)), targets]

    return log_probs


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("settings", [{}, {"scale": 0.3}, {"scale": 1.7, "softcap": 1.5}])
@pytest.mark.parametrize(("temperature", "chunk_size", "tile_rows"), [(1.0, 100, 100), (0.6, 4, 3), (1.5, 1, 1)])
def test_values_and_gradients_equal_the_dense_form(
    has_bias, settings, temperature, chunk_size, tile_rows, dense_log_probs, monkeypatch
):
    monkeypatch.setattr("vpd.losses.head.TILE_NUMBERS", tile_rows * V)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, requires_grad=True)
    bias = torch.randn(V, generator=generator, requires_grad=True) if has_bias else None
    targets = torch.randint(V, (T,), generator=generator)
    head = Head(weight, bias, **settings)
    inputs = [hidden, weight] + ([bias] if bias is not None else [])
    upstream = torch.randn(T, generator=generator)

    actual = token_log_probs(hidden, head, targets, temperature=temperature, chunk_size=chunk_size)
    expected = dense_log_probs(hidden, head, targets, temperature)

    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((actual * upstream).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_bfloat16_inputs_give_float32_log_probs_and_gradients_of_their_own_dtype(dense_log_probs):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, H, generator=generator).bfloat16().requires_grad_()
    weight = torch.nn.Parameter(torch.randn(V, H, generator=generator).bfloat16())
    targets = torch.randint(V, (T,), generator=generator)

    with torch.autocast("cpu", torch.bfloat16):
        actual = token_log_probs(hidden, Head(weight), targets)
        gradients = torch.autograd.grad(actual.sum(), (hidden, weight))

    expected = dense_log_probs(hidden, Head(weight), targets, 1.0)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, expected_gradient in zip(
        gradients, torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True
    ):
        # One rounding to bfloat16 (8 bits) is allowed, none before it.
        torch.testing.assert_close(gradient, expected_gradient, rtol=2**-7, atol=1e-5)


def test_no_tensor_exceeds_a_chunk_of_logits(operation_watch):
    tokens, chunk_size = 64, 6
    hidden, weight = torch.ones(tokens, 2, requires_grad=True), torch.ones(V * 4, 2, requires_grad=True)

    with operation_watch:
        head = Head(weight, softcap=5.0)
        token_log_probs(hidden, head, torch.arange(tokens), chunk_size=chunk_size).sum().backward()

    assert operation_watch.largest_result == chunk_size * V * 4


def test_no_more_than_one_chunk_of_logits_is_there(operation_watch, monkeypatch):
    monkeypatch.setattr("vpd.losses.head.TILE_NUMBERS", 1)
    chunk_size = 4 * torch.get_num_threads()
    hidden, weight = torch.ones(3 * chunk_size, 2, requires_grad=True), torch.ones(V * 4, 2, requires_grad=True)

    with operation_watch:
        token_log_probs(
            hidden, Head(weight), torch.zeros(3 * chunk_size, dtype=torch.long), chunk_size=chunk_size
        ).sum().backward()

    assert operation_watch.largest_result == chunk_size * V * 4
    assert operation_watch.most_of_the_largest == 1


def test_without_tokens_the_sum_is_a_zero_that_backward_accepts():
    hidden, weight = torch.zeros(0, H, requires_grad=True), torch.ones(V, H, requires_grad=True)
    total = token_log_probs(hidden, Head(weight), torch.zeros(0, dtype=torch.int64)).sum()
    total.backward()

    assert total.item() == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.full((T,), -100), "masked positions"),
        (torch.full((T,), V), f"from 0 to {V - 1}"),
        (torch.zeros(T - 1, dtype=torch.int64), "one token id for each hidden state"),
        (torch.zeros(T, dtype=torch.int32), "int64"),
    ],
)
def test_targets_outside_of_the_vocabulary_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        token_log_probs(torch.zeros(T, H), Head(torch.zeros(V, H)), targets)
