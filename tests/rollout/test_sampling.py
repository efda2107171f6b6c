import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vpd.rollout.sampling import BLOCK, TokenSampler, inverse_cdf, sequence_uniforms


def draws(sampler, logits, count=20_000):
    uniforms = sequence_uniforms(0, 0, 0, count)
    return sampler(logits.expand(count, -1), uniforms)


@pytest.mark.parametrize("size", [5, BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_match_probabilities(size, temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(size, generator=generator)
    count = 20_000
    tokens, _ = draws(TokenSampler(temperature), logits, count)
    expected = count * (logits / temperature).softmax(dim=-1)
    # Pool what is rare: the chi-square approximation needs a few expected draws per cell.
    common = expected > 10
    observed = torch.bincount(tokens, minlength=size).float()
    cells = torch.cat([observed[common], observed[~common].sum()[None]])
    means = torch.cat([expected[common], expected[~common].sum()[None].clamp(min=1e-9)])
    degrees = len(cells) - 1
    chi_square = ((cells - means) ** 2 / means).sum()
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-3, 0.25, 1.0, 3.0]), min_size=1, max_size=700),
    uniform=st.sampled_from([0.0, 1e-12, 0.3, 0.5, 1 - 1e-9, 1 - 2**-53]),
)
# In float32 the sum of these is above the true one, and so is the target.
@example(weights=[1.0, 9e-8], uniform=1 - 2**-53)
def test_inverse_cdf_finds_where_the_running_sum_passes_and_never_a_zero(weights, uniform):
    row = torch.tensor([weights])
    if not row.sum() > 0:
        return
    index = int(inverse_cdf(row, torch.tensor([uniform], dtype=torch.float64))[0])
    assert row[0, index] > 0
    running = row.double().cumsum(dim=-1)[0]
    target = uniform * running[-1]
    slack = 1e-6 * running[-1]
    assert running[index] >= target - slack
    assert index == 0 or running[index - 1] <= target + slack


def test_log_probs_are_those_before_the_cuts():
    logits = torch.tensor([3.0, 2.0, 1.0, -1.0, -4.0])
    expected = (logits / 0.7).log_softmax(dim=-1)
    for cuts in ({}, {"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.2}):
        tokens, log_probs = draws(TokenSampler(0.7, **cuts), logits, 200)
        torch.testing.assert_close(log_probs, expected[tokens])


@pytest.mark.parametrize(
    ("cuts", "support"),
    [
        ({"top_k": 2}, {0, 1}),
        # Probabilities 0.64, 0.24, 0.09, 0.03, 0.01: 0.8 of the mass takes two tokens.
        ({"top_p": 0.8}, {0, 1}),
        ({"min_p": 0.1}, {0, 1, 2}),
        ({"top_k": 3, "min_p": 0.3}, {0, 1}),
    ],
)
def test_cuts_restrict_the_support(cuts, support):
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    tokens, _ = draws(TokenSampler(1.0, **cuts), logits, 5000)
    assert set(tokens.tolist()) == support


def test_greedy_takes_the_most_likely_and_reports_its_log_prob_at_temperature_one():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]], dtype=torch.bfloat16)
    tokens, log_probs = TokenSampler(temperature=0)(logits, torch.zeros(2, dtype=torch.float64))
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(log_probs, logits.float().log_softmax(dim=-1)[[0, 1], tokens])


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="not finite"):
        TokenSampler()(torch.tensor([[0.0, float("nan")]]), torch.zeros(1, dtype=torch.float64))


def test_uniforms_depend_on_each_argument_and_on_nothing_else():
    state = torch.get_rng_state()
    base = sequence_uniforms(1, 2, 3, 8)
    assert torch.equal(base, sequence_uniforms(1, 2, 3, 8))
    assert torch.equal(base[:4], sequence_uniforms(1, 2, 3, 4))
    for other in ((0, 2, 3), (1, 1, 3), (1, 2, 0), (2, 1, 3)):
        assert not torch.equal(base, sequence_uniforms(*other, 8))
    assert torch.equal(state, torch.get_rng_state())
