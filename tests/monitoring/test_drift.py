"""Each failure of a run's course gives its warning once, and a healthy run gives none."""

from __future__ import annotations

import re

import pytest

from vpd.monitoring.drift import drift_warnings, forget_beginning
from vpd.monitoring.warnings import batch_warnings, template_warning

HEALTHY = {
    "length_mean": 40.0,
    "truncated_share": 0.05,
    "repetition": 0.1,
    "entropy": 0.4,
    "divergence": 0.05,
    "margin_on_arrival": 0.8,
}


def course(batches):
    """Return the warnings of a whole run, by batch."""
    history: dict[str, float] = {}
    return [drift_warnings(history, metrics) for metrics in batches]


def test_a_healthy_run_that_learns_is_left_in_peace():
    batches = [
        HEALTHY | {"entropy": 0.4 - 0.01 * i, "margin_on_arrival": 0.8 - 0.02 * i, "length_mean": 40.0 - 0.5 * i}
        for i in range(30)
    ]
    assert not any(course(batches))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length_mean": 200.0}, r"tokens long on average, against 40 at the start"),
        ({"length_mean": 4.0}, r"tokens long on average, against 40 at the start"),
        ({"truncated_share": 0.9}, r"cut off by the length limit, against 5% at the start"),
        ({"repetition": 0.8}, r"3-grams repeat, against 10%"),
        ({"entropy": 3.0}, r"entropy is \d\.\d+ nats a token, against 0.40"),
        ({"divergence": 2.0}, r"nats a token apart, against 0.05"),
    ],
)
def test_each_drift_is_told_once_with_its_remedy(change, words):
    warnings = course([HEALTHY] * 5 + [HEALTHY | change] * 20)
    told = [warning["collapse"] for warning in warnings if "collapse" in warning]
    assert len(told) == 1
    assert re.search(words, told[0])
    assert "optim.learning_rate" in told[0]
    assert "eval.load_best_model_at_end" in told[0]


def test_one_odd_batch_is_no_drift():
    assert not any(course([HEALTHY] * 5 + [HEALTHY | {"truncated_share": 0.9}] + [HEALTHY] * 5))


def test_a_teacher_whose_margin_is_gone_is_told():
    warnings = course([HEALTHY] * 6 + [HEALTHY | {"margin_on_arrival": -0.5}] * 10)
    assert sum("plateau" in warning for warning in warnings) == 1


def test_batches_without_a_value_change_nothing():
    missing = dict.fromkeys(HEALTHY, None)
    assert not any(course([HEALTHY, missing, HEALTHY, missing, HEALTHY] + [HEALTHY] * 10))


def test_a_zero_gradient_and_unlike_beginnings_are_told():
    told = batch_warnings({"active_share": 1.0, "grad_norm": 0.0}, ["environment"])
    assert "every group's rewards are equal" in told["zero_gradient"]
    assert "zero_gradient" not in batch_warnings({"active_share": 1.0, "grad_norm": 1e-9}, ["environment"])
    told = batch_warnings({"active_share": 1.0, "divergence": 0.2, "divergence_first": 4.0}, ["environment"])
    assert "chat_template_kwargs" in told["first_token"]
    assert not batch_warnings({"active_share": 1.0, "divergence": 0.2, "divergence_first": 0.9}, ["environment"])


def test_a_lead_with_foreign_feedback_is_told():
    assert "feedback of other tasks" in (template_warning(0.1) or "")
    assert template_warning(-0.1) is None
    assert template_warning(float("nan")) is None


def names_of(batches):
    history, names = {}, set()
    for metrics in batches:
        names |= drift_warnings(history, metrics).keys()
    return names


def test_a_loss_of_successes_is_a_collapse_and_a_rise_of_rewards_is_none():
    falls = [{"success_rate": 0.8, "reward": 0.8}] * 3 + [{"success_rate": 0.1, "reward": 0.1}] * 6
    assert names_of(falls) == {"collapse"}
    # By the group, all fail once all rewards are alike.
    converges = [{"success_rate": 0.5, "reward": 0.3}] * 3 + [{"success_rate": 0.0, "reward": 0.9}] * 6
    assert names_of(converges) == set()
    briefer = [{"success_rate": 0.2, "reward": 0.2, "length_mean": 100.0}] * 3
    assert names_of(briefer + [{"success_rate": 0.9, "reward": 0.9, "length_mean": 5.0}] * 6) == set()
    assert names_of(briefer + [{"success_rate": 0.1, "reward": 0.1, "length_mean": 5.0}] * 6) == {"collapse"}


def test_a_harder_stage_begins_anew():
    history = {}
    for _ in range(5):
        drift_warnings(history, {"success_rate": 0.8, "reward": 0.8, "margin_on_arrival": 1.0})
    forget_beginning(history)
    assert {key.partition(".")[0] for key in history} == {"margin_on_arrival"}
    for _ in range(6):
        assert not drift_warnings(history, {"success_rate": 0.05, "reward": 0.05})
