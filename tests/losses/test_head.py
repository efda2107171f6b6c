"""The head's logits against the formula, and its refusals."""

from __future__ import annotations

import sys

import pytest
import torch

from vpd.device import has_amx, multiplies_bfloat16, rounding_factors
from vpd.losses import Head, divergence, token_log_probs
from vpd.losses import head as head_module
from vpd.losses.head import HeadProducts, tiles


@pytest.fixture(params=["by oneDNN", "by hand"])
def rounding(request, monkeypatch):
    """Both ways to round factors, the second also on a CPU that would take the first."""
    if not multiplies_bfloat16():
        pytest.skip("this CPU has no products in bfloat16")
    if request.param == "by hand":
        monkeypatch.setattr("vpd.losses.head.has_amx", lambda: False)
        # Several slices of the vocabulary, the last one shorter.
        monkeypatch.setattr("vpd.losses.head.WORDS_AT_A_TIME", 48)
    elif not has_amx():
        pytest.skip("without AMX oneDNN rounds no float32 products")


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_logits_follow_the_formula(softcap, has_bias):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((4, 3), (7, 3), (7,)))
    expected = (hidden @ weight.T + (bias if has_bias else 0.0)) * 0.4
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)

    logits = Head(weight, bias if has_bias else None, scale=0.4, softcap=softcap).logits(hidden, temperature=0.7)

    torch.testing.assert_close(logits, expected / 0.7)


def test_logits_are_float32_under_autocast_and_differentiable():
    weight = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    hidden = torch.ones(4, 3, dtype=torch.bfloat16)

    with torch.autocast("cpu", torch.bfloat16):
        logits = Head(weight, softcap=2.0).logits(hidden)
    logits.sum().backward()

    torch.testing.assert_close(logits, 2.0 * torch.tanh(hidden.float() @ weight.float().T / 2.0))
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(7)}, "must be \\[vocabulary, hidden\\]"),
        ({"weight": torch.zeros(7, 3), "bias": torch.zeros(3)}, "each of the 7 words"),
        ({"weight": torch.zeros(7, 3), "softcap": 0.0}, "softcap must be positive"),
    ],
)
def test_heads_that_do_not_fit_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Head(**arguments)


def _losses(hidden, weight, bias, settings):
    """Log-probabilities and divergences of some tokens, and the gradients of both with respect to all inputs."""
    head = Head(weight, bias, **settings)
    log_probs = token_log_probs(hidden, head, torch.arange(len(hidden)))
    divergences = divergence(hidden, hidden.detach().roll(1, dims=0), head, kind="js")
    values = [log_probs, divergences.per_token]
    gradients = [torch.autograd.grad(total, (hidden, weight, bias)) for total in (log_probs.sum(), divergences.total)]
    return values, [gradient for pair in gradients for gradient in pair[:2]]


def _inputs(rounded=False):
    """Hidden states and weights of a size from which on oneDNN rounds."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(48, 64, generator=generator), torch.randn(160, 64, generator=generator)
    bias = torch.randn(160, generator=generator).requires_grad_()
    return [*((x.bfloat16().float() if rounded else x).requires_grad_() for x in (hidden, weight)), bias]


def _distance(left, right):
    return float((left.detach().double() - right.detach().double()).norm() / right.detach().double().norm())


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("settings", [{}, {"softcap": 16.0}])
def test_autocast_rounds_the_factors_of_the_heads_products_and_nothing_else(settings):
    with torch.autocast("cpu", torch.bfloat16):
        values, gradients = _losses(*_inputs(), settings)
    rounded_values, rounded_gradients = _losses(*_inputs(rounded=True), settings)
    exact_values, exact_gradients = _losses(*_inputs(), settings)

    for value, rounded, exact in zip(values, rounded_values, exact_values, strict=True):
        assert value.dtype == torch.float32
        # Sums, and all that follows them, stay in float32. Without AMX the logits' factors do too.
        assert _distance(value, rounded if has_amx else exact) < 1e-5
        assert 1e-4 < _distance(value, exact if has_amx else rounded) < 1e-2
    # The gradients round one factor more, the logits' gradient: at most by 8 bits.
    for gradient, rounded, exact in zip(gradients, rounded_gradients, exact_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert 1e-4 < _distance(gradient, exact) < 3e-2
        assert _distance(gradient, rounded if has_amx else exact) < 2**-8


@pytest.mark.usefixtures("rounding")
def test_what_rounding_the_logits_would_lose_is_not_lost():
    """Logits of some hundreds, whose neighbours in bfloat16 are one or two apart."""
    hidden, weight, _ = _inputs(rounded=True)
    hidden, weight = 8 * hidden.detach(), 4 * weight.detach()

    logits = HeadProducts(weight, rounded=True).logits(hidden)

    assert logits.abs().max() > 512
    assert (logits.double() - hidden.double() @ weight.double().T).abs().max() < 0.01


@pytest.mark.parametrize("autocast", [False, True])
def test_forward_and_backward_round_under_autocast_alone(autocast, monkeypatch):
    asked = []

    def record(weight, *, rounded):
        asked.append(rounded)
        return HeadProducts(weight, rounded=rounded)

    for module in ("log_probs", "divergence"):
        monkeypatch.setattr(sys.modules[f"vpd.losses.{module}"], "HeadProducts", record)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        log_probs = token_log_probs(*_head_inputs())
    log_probs.sum().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden, head, _ = _head_inputs()
        divergence(hidden, hidden.detach(), head)

    assert asked == [autocast] * 3, "log-probabilities forward and backward, and divergence"


def _head_inputs():
    hidden, weight, _ = _inputs()
    return hidden, Head(weight), torch.arange(len(hidden))


@pytest.mark.skipif(not has_amx, reason="without AMX oneDNN rounds no float32 products")
def test_products_are_exact_again_after_a_loss_and_after_an_error():
    hidden, weight, bias = _inputs()
    exact = hidden @ weight.T
    with torch.autocast("cpu", torch.bfloat16):
        _losses(hidden, weight, bias, {})

    assert not torch.equal(HeadProducts(weight, rounded=True).logits(hidden), exact)
    with pytest.raises(RuntimeError):
        HeadProducts(weight, rounded=True).logits(hidden[:, 1:])

    assert torch.equal(hidden @ weight.T, exact)


@pytest.mark.parametrize("chunk_size", [7, 48])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_gradient_is_added_to_what_stood_in_memory(monkeypatch, chunk_size, autocast):
    def poisoned(like, **kwargs):
        return torch.full(like.shape, float("nan"), dtype=kwargs.get("dtype", like.dtype))

    def gradients():
        hidden, weight, _ = _inputs()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = divergence(hidden, hidden.detach().roll(1, dims=0), Head(weight), chunk_size=chunk_size).total
        return torch.autograd.grad(total, (hidden, weight))

    expected = gradients()
    monkeypatch.setattr(head_module.torch, "empty_like", poisoned)
    for found, clean in zip(gradients(), expected, strict=True):
        assert torch.equal(found, clean)


def test_the_switch_for_rounded_products_is_put_back_after_a_loss_and_after_an_error():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    hidden, weight, bias = _inputs()
    seen = []
    with rounding_factors(torch.device("cpu")):
        seen.append(matmul.fp32_precision)
    with torch.autocast("cpu", torch.bfloat16):
        _losses(hidden, weight, bias, {})
    seen.append(matmul.fp32_precision)
    with pytest.raises(RuntimeError):
        HeadProducts(weight, rounded=True).logits(hidden[:, 1:])
    seen.append(matmul.fp32_precision)

    assert seen == ["bf16", before, before]
    assert before != "bf16"


def test_a_divergence_is_differentiated_once():
    hidden, weight, _ = _inputs()
    total = divergence(hidden, hidden.detach().roll(1, dims=0), Head(weight)).total
    (first,) = torch.autograd.grad(total, hidden, retain_graph=True)

    assert first.abs().sum() > 0
    with pytest.raises(RuntimeError, match="no second backward pass"):
        torch.autograd.grad(total, hidden)


def test_tiles_cover_each_row_once_however_large_the_vocabulary_is():
    for rows, words in ((0, 5), (1, 2**20), (7, 2**16), (256, 49152), (3, 1)):
        covered = [index for tile in tiles(torch.empty(rows, words, device="meta")) for index in range(rows)[tile]]
        assert covered == list(range(rows))
        logits = torch.empty(1, 1).expand(rows, words)
        covered = [index for tile in tiles(logits) for index in range(rows)[tile]]
        assert covered == list(range(rows))
