"""The fused divergence against a dense one that holds all logits and lets autograd differentiate."""

from __future__ import annotations

import math

import pytest
import torch
from dense import KINDS, close, dense_divergence, parameter
from torch import Tensor

from vpd.losses import Head, divergence, token_log_probs

T, H, V = 13, 6, 17
HEAD_SETTINGS = [
    {},
    {"scale": 0.3},
    {"softcap": 2.0},
    {"scale": 1.7, "softcap": 1.5},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("settings", HEAD_SETTINGS)
@pytest.mark.parametrize(("temperature", "chunk_size", "tile_rows"), [(1.0, 100, 100), (0.7, 5, 2), (2.0, 1, 1)])
def test_values_and_gradients_equal_the_dense_form(
    kind, has_bias, settings, temperature, chunk_size, tile_rows, dense_logits, monkeypatch
):
    monkeypatch.setattr("vpd.losses.head.TILE_NUMBERS", tile_rows * V)
    generator = torch.Generator().manual_seed(0)
    student_hidden, teacher_hidden = parameter(generator, T, H), torch.randn(T, H, generator=generator)
    weight = parameter(generator, V, H)
    bias = parameter(generator, V) if has_bias else None
    head = Head(weight, bias, **settings)
    token_weights = torch.rand(T, generator=generator)
    inputs = [student_hidden, weight] + ([bias] if bias is not None else [])

    loss = divergence(
        student_hidden,
        teacher_hidden,
        head,
        token_weights=token_weights,
        kind=kind,
        alpha=0.3,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    gradients = torch.autograd.grad(3.0 * loss.total, inputs)

    per_token, entropy = dense_divergence(
        dense_logits(student_hidden, head, temperature), dense_logits(teacher_hidden, head, temperature), kind, 0.3
    )
    total = (token_weights * per_token).sum()
    close(loss.per_token, per_token)
    close(loss.entropy, entropy)
    close(loss.total, total)
    assert not loss.per_token.requires_grad
    assert not loss.entropy.requires_grad
    for actual, expected in zip(gradients, torch.autograd.grad(3.0 * total, inputs), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_gets_no_gradient_and_may_have_another_width(kind, dense_logits):
    generator = torch.Generator().manual_seed(1)
    student_hidden, teacher_hidden = parameter(generator, T, H), parameter(generator, T, H + 2)
    student_head = Head(parameter(generator, V, H))
    teacher_head = Head(parameter(generator, V, H + 2), parameter(generator, V), softcap=3.0)

    loss = divergence(student_hidden, teacher_hidden, student_head, teacher_head, kind=kind)
    loss.total.backward()

    assert teacher_hidden.grad is None
    assert teacher_head.weight.grad is None
    assert teacher_head.bias is not None
    assert teacher_head.bias.grad is None
    logits = dense_logits(student_hidden, student_head, 1.0), dense_logits(teacher_hidden, teacher_head, 1.0)
    expected = dense_divergence(*logits, kind)[0].sum()
    expected_gradients = torch.autograd.grad(expected, [student_hidden, student_head.weight])
    close(student_hidden.grad, expected_gradients[0])
    close(student_head.weight.grad, expected_gradients[1])


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_is_at_rest_where_student_equals_teacher(kind):
    generator = torch.Generator().manual_seed(2)
    hidden, weight = parameter(generator, T, H), parameter(generator, V, H)

    loss = divergence(hidden, hidden.detach().clone(), Head(weight), kind=kind, alpha=0.2)
    loss.total.backward()

    for value in (loss.per_token, hidden.grad, weight.grad):
        close(value, torch.zeros_like(value), 1e-6)


def test_js_over_alpha_tends_to_the_forward_kl():
    generator = torch.Generator().manual_seed(3)
    hidden, teacher_hidden = torch.randn(2, T, H, generator=generator)
    head = Head(0.3 * torch.randn(V, H, generator=generator))
    forward_kl = divergence(hidden, teacher_hidden, head, kind="forward_kl").per_token

    errors = [
        (divergence(hidden, teacher_hidden, head, kind="js", alpha=alpha).per_token / alpha - forward_kl).abs().max()
        for alpha in (1e-1, 1e-2, 1e-3)
    ]

    assert errors[0] > 5 * errors[1] > 25 * errors[2], "the distance should shrink in proportion to alpha"
    assert errors[2] < 1e-2 * forward_kl.max()


@pytest.mark.parametrize("alpha", [1e-4, 0.05, 0.5, 0.999])
def test_js_and_its_gradient_equal_the_dense_form_at_any_alpha(alpha, dense_logits):
    generator = torch.Generator().manual_seed(7)
    hidden, teacher_hidden = parameter(generator, T, H), torch.randn(T, H, generator=generator)
    head = Head(torch.randn(V, H, generator=generator))

    loss = divergence(hidden, teacher_hidden, head, kind="js", alpha=alpha)
    gradient = torch.autograd.grad(loss.total, hidden)[0]

    logits = dense_logits(hidden, head, 1.0), dense_logits(teacher_hidden, head, 1.0)
    expected = dense_divergence(*logits, "js", alpha)[0]
    close(loss.per_token / alpha, expected / alpha)
    close(gradient / alpha, torch.autograd.grad(expected.sum(), hidden)[0] / alpha)


@pytest.mark.parametrize("alpha", [0.01, 0.5])
def test_js_of_two_that_nearly_agree_keeps_its_digits(alpha, dense_logits):
    generator = torch.Generator().manual_seed(9)
    hidden = parameter(generator, T, H)
    teacher_hidden = hidden.detach() + 2e-3 * torch.randn(T, H, generator=generator)
    head = Head(torch.randn(V, H, generator=generator))

    loss = divergence(hidden, teacher_hidden, head, kind="js", alpha=alpha)
    gradient = torch.autograd.grad(loss.total, hidden)[0]

    logits = dense_logits(hidden, head, 1.0), dense_logits(teacher_hidden, head, 1.0)
    expected = dense_divergence(*logits, "js", alpha)[0]
    expected_gradient = torch.autograd.grad(expected.sum(), hidden)[0]
    # The log-probabilities' own rounding, 1e-7 next to differences of 1e-3, is what is left.
    assert (gradient - expected_gradient).norm() < 2e-3 * expected_gradient.norm()
    assert (loss.per_token - expected).abs().max() < 0.02 * expected.mean()


@pytest.mark.parametrize(("alpha", "kind"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_js_at_its_ends_is_a_kl(alpha, kind):
    generator = torch.Generator().manual_seed(4)
    hidden, teacher_hidden = torch.randn(2, T, H, generator=generator)
    head = Head(torch.randn(V, H, generator=generator))

    at_the_end = divergence(hidden, teacher_hidden, head, kind="js", alpha=alpha).per_token

    assert torch.equal(at_the_end, divergence(hidden, teacher_hidden, head, kind=kind).per_token)
    assert at_the_end.min() > 0


def test_exchanging_student_and_teacher_exchanges_the_kls_and_mirrors_js():
    generator = torch.Generator().manual_seed(5)
    hidden, teacher_hidden = torch.randn(2, T, H, generator=generator)
    head = Head(torch.randn(V, H, generator=generator))

    def per_token(student: Tensor, teacher: Tensor, **settings) -> Tensor:
        return divergence(student, teacher, head, **settings).per_token

    close(
        per_token(hidden, teacher_hidden, kind="reverse_kl"),
        per_token(teacher_hidden, hidden, kind="forward_kl"),
    )
    close(
        per_token(hidden, teacher_hidden, kind="js", alpha=0.2),
        per_token(teacher_hidden, hidden, kind="js", alpha=0.8),
    )
    assert per_token(hidden, teacher_hidden, kind="js").max() <= math.log(2)


@pytest.mark.parametrize("kind", KINDS)
def test_distributions_far_apart_give_finite_losses_and_gradients(kind):
    hidden = torch.tensor([[300.0, 0.0]], requires_grad=True)
    loss = divergence(hidden, -hidden.detach(), Head(torch.eye(3, 2)), kind=kind)
    loss.total.backward()

    assert hidden.grad is not None
    assert torch.isfinite(loss.total)
    assert torch.isfinite(hidden.grad).all()
    assert loss.total > 0.6


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("js", 0.5), ("js", 0.1), ("js", 0.8)]
)
def test_equals_trl_generalized_jsd(kind, beta, temperature, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    generator = torch.Generator().manual_seed(6)
    hidden, teacher_hidden = parameter(generator, T, H), torch.randn(T, H, generator=generator)
    head = Head(parameter(generator, V, H))
    inputs = [hidden, head.weight]

    ours = divergence(hidden, teacher_hidden, head, kind=kind, alpha=beta, temperature=temperature).total
    theirs = GKDTrainer.generalized_jsd_loss(
        hidden @ head.weight.T, (teacher_hidden @ head.weight.T).detach(), None, beta, temperature, reduction="sum"
    )

    close(ours, theirs)
    for actual, expected in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_exceeds_a_chunk_of_logits(kind, operation_watch):
    tokens, hidden_width, vocabulary, chunk_size = 64, 3, 50, 4
    generator = torch.Generator().manual_seed(7)
    hidden, teacher_hidden = parameter(generator, tokens, hidden_width), torch.randn(tokens, hidden_width)
    head = Head(parameter(generator, vocabulary, hidden_width), parameter(generator, vocabulary), softcap=5.0)

    with operation_watch:
        divergence(hidden, teacher_hidden, head, kind=kind, chunk_size=chunk_size).total.backward()

    assert operation_watch.largest_result == chunk_size * vocabulary


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_than_one_chunk_of_either_sides_logits_is_there(kind, operation_watch, monkeypatch):
    monkeypatch.setattr("vpd.losses.head.TILE_NUMBERS", 1)
    vocabulary, chunk_size = 50, 4 * torch.get_num_threads()
    hidden, teacher_hidden = torch.ones(3 * chunk_size, 2, requires_grad=True), torch.ones(3 * chunk_size, 2)
    head = Head(torch.ones(vocabulary, 2, requires_grad=True))

    with operation_watch:
        divergence(hidden, teacher_hidden, head, kind=kind, chunk_size=chunk_size).total.backward()

    assert operation_watch.largest_result == chunk_size * vocabulary
    assert operation_watch.most_of_the_largest == 2


@pytest.mark.parametrize("kind", KINDS)
def test_without_tokens_the_total_is_a_zero_that_backward_accepts(kind):
    hidden, weight = torch.zeros(0, H, requires_grad=True), torch.ones(V, H, requires_grad=True)
    loss = divergence(hidden, torch.zeros(0, H), Head(weight), kind=kind)
    loss.total.backward()

    assert loss.total.item() == 0.0
    assert loss.per_token.shape == loss.entropy.shape == (0,)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, H)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_inputs_give_float32_losses_and_gradients_of_their_own_dtype(kind, dense_logits):
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(T, H, generator=generator).bfloat16().requires_grad_()
    teacher_hidden = torch.randn(T, H, generator=generator).bfloat16()
    weight = torch.nn.Parameter(torch.randn(V, H, generator=generator).bfloat16())
    head = Head(weight)

    with torch.autocast("cpu", torch.bfloat16):
        loss = divergence(hidden, teacher_hidden, head, kind=kind, chunk_size=4)
        loss.total.backward()

    per_token, _ = dense_divergence(dense_logits(hidden, head, 1.0), dense_logits(teacher_hidden, head, 1.0), kind)
    close(loss.per_token, per_token)
    for value, expected in zip((hidden, weight), torch.autograd.grad(per_token.sum(), (hidden, weight)), strict=True):
        assert value.grad is not None
        assert value.grad.dtype == torch.bfloat16
        # One rounding to bfloat16 (8 bits) is allowed, none before it.
        torch.testing.assert_close(value.grad, expected, rtol=2**-7, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_no_gradient_work(operation_watch):
    generator = torch.Generator().manual_seed(9)
    hidden, teacher_hidden = parameter(generator, T, H), torch.randn(T, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    trained = weight.clone().requires_grad_()
    divergence(hidden, teacher_hidden, Head(trained)).total.backward()
    expected, hidden.grad = hidden.grad, None

    with operation_watch:
        divergence(hidden, teacher_hidden, Head(weight)).total.backward()

    assert weight.grad is None
    assert torch.equal(hidden.grad, expected)
    assert operation_watch.matmuls == 3


def test_without_gradient_only_the_two_heads_are_multiplied(operation_watch):
    hidden, weight = torch.ones(T, H, requires_grad=True), torch.ones(V, H, requires_grad=True)

    with torch.no_grad(), operation_watch:
        loss = divergence(hidden, torch.ones(T, H), Head(weight))

    assert not loss.total.requires_grad
    assert operation_watch.matmuls == 2


@pytest.mark.parametrize("kind", KINDS)
def test_targets_hand_out_both_log_probs_and_leave_the_loss_alone(kind):
    generator = torch.Generator().manual_seed(10)
    hidden, teacher_hidden = parameter(generator, T, H), parameter(generator, T, H)
    student_head, teacher_head = Head(parameter(generator, V, H)), Head(parameter(generator, V, H), softcap=2.0)
    targets = torch.randint(V, (T,), generator=generator)
    settings = {"kind": kind, "temperature": 0.7, "chunk_size": 4}

    plain = divergence(hidden, teacher_hidden, student_head, teacher_head, **settings)
    loss = divergence(hidden, teacher_hidden, student_head, teacher_head, targets=targets, **settings)

    assert plain.student_log_probs is plain.teacher_log_probs is None
    assert loss.student_log_probs is not None
    assert loss.teacher_log_probs is not None
    assert not loss.student_log_probs.requires_grad
    close(loss.student_log_probs, token_log_probs(hidden, student_head, targets, temperature=0.7))
    close(loss.teacher_log_probs, token_log_probs(teacher_hidden, teacher_head, targets, temperature=0.7))
    assert torch.equal(loss.total, plain.total)
    inputs = [hidden, student_head.weight]
    for gradient, expected in zip(
        torch.autograd.grad(loss.total, inputs), torch.autograd.grad(plain.total, inputs), strict=True
    ):
        assert torch.equal(gradient, expected)


def test_double_backward_is_refused():
    hidden = torch.ones(T, H, requires_grad=True)
    total = divergence(hidden, torch.zeros(T, H), Head(torch.eye(V, H))).total
    (gradient,) = torch.autograd.grad(total.square(), hidden, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_hidden": torch.zeros(2, 3, H)}, "flatten batch and sequence"),
        ({"teacher_hidden": torch.zeros(T + 1, H)}, "same completion tokens"),
        ({"teacher_head": Head(torch.zeros(V + 1, H))}, "one vocabulary"),
        ({"token_weights": torch.ones(T, 1)}, "one for each token"),
        ({"targets": torch.zeros(T, 1, dtype=torch.int64)}, "targets must be"),
        ({"kind": "kl"}, "reverse_kl, forward_kl, js"),
        ({"alpha": 1.5}, "between 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"chunk_size": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(changes, message):
    arguments = {
        "student_hidden": torch.zeros(T, H),
        "teacher_hidden": torch.zeros(T, H),
        "student_head": Head(torch.zeros(V, H)),
    }
    with pytest.raises(ValueError, match=message):
        divergence(**(arguments | changes))
