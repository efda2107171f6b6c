"""A training run with a fixed seed gives the same curve with each optimisation and without it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from dense import dense_divergence
from toy import toy_trainer

from vpd.device import multiplies_bfloat16
from vpd.losses import Head
from vpd.packing import batch, pack
from vpd.policy import learner
from vpd.policy.module import PolicyModule
from vpd.rollout import prefill, prompt_groups
from vpd.rollout.kv_cache import PreallocatedCache
from vpd.rollout.prefill import Prefill

STEPS = 4
# Sums of log-probabilities that nearly cancel keep the rounding of what they are made of.
ROUNDING = {"margin": 1e-6, "margin_after": 1e-6, "reward_shift": 1e-6}
CURVES = ("reward", "divergence", "entropy", "m_loss", "e_loss", "grad_norm", *ROUNDING)


def curve(folder, **sections) -> list[dict]:
    """What each of a few batches logged; the toy's first and third have E-steps."""
    sections = {"run": {"max_steps": STEPS}, "eval": {"preflight_tasks": 0, "final_tasks": 0}, **sections}
    toy_trainer(folder, algorithm={"divergence": "js", "teacher": "live"}, **sections).train()
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "train"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The curve with all of them; toy prompts are too short for generations to share them by default."""
    packed, may_share, shared = [], [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_groups, "MINIMUM_SAVING", 1)
        call, share = Prefill.__call__, PreallocatedCache.share_prompts

        def watched(self, *args):
            packed.append(self.packs)
            may_share.append(self.shares)
            return call(self, *args)

        patch.setattr(Prefill, "__call__", watched)
        patch.setattr(
            PreallocatedCache, "share_prompts", lambda *args, **how: (shared.append(share(*args, **how)), shared[-1])[1]
        )
        found = curve(tmp_path_factory.mktemp("optimised") / "run")
    assert len(packed) >= STEPS
    assert all(packed)
    assert all(may_share)
    assert all(shared)
    assert sum("e_loss" in line for line in found) == STEPS // 2
    return found


def assert_the_same(found, expected) -> None:
    assert len(found) == len(expected) == STEPS
    for left, right in zip(found, expected, strict=True):
        compared = [name for name in CURVES if right.get(name) is not None]
        assert {"reward", "divergence", "m_loss", "grad_norm"} <= set(compared)
        for name in compared:
            near = pytest.approx(right[name], rel=1e-3, abs=ROUNDING.get(name, 1e-9), nan_ok=True)
            assert left[name] == near, name


def tokens(lines) -> int:
    return sum(line["tokens_computed"] for line in lines)


@pytest.mark.parametrize("what", ["prefixes", "keys"])
def test_tokens_computed_again(tmp_path, monkeypatch, expected, what):
    if what == "prefixes":
        monkeypatch.setattr("vpd.policy.prepare.may_share_prefixes", lambda network, kernel="blocks": False)
    else:
        monkeypatch.setattr(PolicyModule, "can_reuse_keys", False)
    found = curve(tmp_path / "run")
    assert tokens(found) > tokens(expected)
    assert_the_same(found, expected)


def test_every_prompt_read_from_its_beginning(tmp_path, monkeypatch, expected):
    monkeypatch.setattr(prefill, "packable", lambda model: (False, "not here"))
    assert_the_same(curve(tmp_path / "run"), expected)


def test_every_generation_with_its_own_prompt(tmp_path, monkeypatch, expected):
    monkeypatch.setattr(prompt_groups, "MINIMUM_SAVING", 10**9)
    assert_the_same(curve(tmp_path / "run"), expected)


def test_passes_that_are_not_filled_up(tmp_path, monkeypatch, expected):
    padding = []
    for multiple in (16, 1):
        monkeypatch.setattr(batch, "PAD_TO_MULTIPLE_OF", multiple)
        monkeypatch.setattr(learner, "pack", lambda *args, **how: _noted(padding, pack(*args, **how)))
        found = curve(tmp_path / str(multiple))
        assert any(padding) is (multiple == 16)
        assert tokens(found) == tokens(expected)
        assert_the_same(found, expected)
        padding.clear()


def _noted(seen, made):
    seen.append(made.padding)
    return made


def test_losses_on_all_logits_at_once(tmp_path, monkeypatch, expected):
    used = set()

    def logits_of(states, head, temperature):
        return states.double() @ head.weight.double().T / temperature

    def of(logits, targets):
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def divergence(student, teacher, head, teacher_head, *, token_weights, targets, kind, alpha, temperature, **_):
        used.add("divergence")
        logits = [logits_of(states, head, temperature) for states in (student, teacher.detach())]
        per_token, entropy = dense_divergence(*logits, kind, alpha)
        return SimpleNamespace(
            total=(token_weights * per_token).sum(),
            per_token=per_token.detach(),
            entropy=entropy.detach(),
            student_log_probs=of(logits[0], targets).detach(),
            teacher_log_probs=of(logits[1], targets),
        )

    def token_log_probs(hidden, head, targets, *, temperature=1.0, **_):
        used.add("token_log_probs")
        return of(logits_of(hidden, head, temperature), targets)

    for module in ("distil", "scoring"):
        monkeypatch.setattr(f"vpd.policy.objectives.{module}.divergence", divergence)
    for module in ("base", "distil"):
        monkeypatch.setattr(f"vpd.policy.objectives.{module}.token_log_probs", token_log_probs)
    found = curve(tmp_path / "run")
    assert used == {"divergence", "token_log_probs"}
    assert_the_same(found, expected)


def test_losses_on_the_logits_of_a_few_tokens_at_a_time(tmp_path, monkeypatch, expected):
    logits, sizes = Head.logits, set()

    def noted(head, hidden, *args, **kwargs):
        sizes.add(len(hidden))
        return logits(head, hidden, *args, **kwargs)

    monkeypatch.setattr(Head, "logits", noted)
    assert_the_same(curve(tmp_path / "run", model={"logits_chunk_tokens": 5}), expected)
    assert max(sizes) == 5


def test_adamw_as_a_loop(tmp_path, monkeypatch, expected):
    adamw, used = torch.optim.AdamW, []

    def loop(*args, fused, **kwargs):
        used.append(fused)
        return adamw(*args, foreach=False, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", loop)
    found = curve(tmp_path / "run")
    assert used == [True]
    assert_the_same(found, expected)


@pytest.mark.parametrize("setting", ["fused_layers", "gradient_checkpointing"])
def test_settings_of_the_model(tmp_path, expected, setting):
    assert_the_same(curve(tmp_path / "run", model={setting: setting == "gradient_checkpointing"}), expected)


def test_passes_that_keep_what_they_could_recompute(tmp_path, monkeypatch, expected):
    monkeypatch.setattr("vpd.policy.prepare.optimises_layers", lambda settings: False)
    assert_the_same(curve(tmp_path / "run"), expected)


def test_small_micro_batches(tmp_path, expected):
    found = curve(tmp_path / "run", optim={"micro_batch_tokens": 300})
    assert tokens(found) > tokens(expected), "prompts are computed once for each part"
    assert_the_same(found, expected)


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU has no products in bfloat16")
@pytest.mark.parametrize("what", ["attention", "head"])
def test_products_in_bfloat16(tmp_path, monkeypatch, what):
    """Under autocast, whose rounding is all that tells the two curves apart."""
    settings = {"model": {"autocast": "bfloat16"}}
    expected = curve(tmp_path / "expected", **settings)
    if what == "attention":
        monkeypatch.setattr("vpd.packing.kernels.products.can_multiply", lambda *args: False)
    else:
        monkeypatch.setattr("vpd.losses.head.multiplies_bfloat16", lambda: False)
        monkeypatch.setattr("vpd.losses.head.rounding_factors", lambda device: nullcontext())
    found = curve(tmp_path / "found", **settings)
    assert [line["grad_norm"] for line in found] != [line["grad_norm"] for line in expected]
    for left, right in zip(found, expected, strict=True):
        assert left["reward"] == right["reward"]
        for name in CURVES:
            if right.get(name) is not None:
                assert left[name] == pytest.approx(right[name], rel=0.01, abs=3e-4, nan_ok=True), name
