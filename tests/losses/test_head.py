"""The head's logits against the formula, and its refusals."""

from __future__ import annotations

import pytest
import torch

from vpd.losses import Head


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
