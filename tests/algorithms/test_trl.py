"""TRL's losses and ours give the same values and gradients on the same tensors."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vpd.losses import Head, clipped_policy_gradient, divergence, reference_kl

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import GRPOTrainer
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.sdpo.sdpo_trainer import DistillationLogits, SDPOTrainer

B, T, H, V = 4, 6, 5, 19
LENGTHS = torch.tensor([6, 3, 5, 1])
MASK = (torch.arange(T)[None] < LENGTHS[:, None]).float()
"""[B, T]: TRL pads; here the same tokens stand in one row."""
ACTIVE = MASK.bool()


def weights(aggregation: str) -> Tensor:
    """Token weights [S] of ``token_mean`` (TRL's bnpo) or ``sequence_mean`` (its grpo, and its SDPO)."""
    if aggregation == "token_mean":
        return torch.full((int(LENGTHS.sum()),), 1.0 / int(LENGTHS.sum()))
    return torch.repeat_interleave(1.0 / (B * LENGTHS.float()), LENGTHS)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("aggregation", "loss_type"), [("sequence_mean", "grpo"), ("token_mean", "bnpo")])
def test_grpo_equals_trl(aggregation, loss_type, beta):
    generator = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(B, T, generator=generator)
    old = log_probs + 0.5 * torch.randn(B, T, generator=generator)
    reference = log_probs + 0.5 * torch.randn(B, T, generator=generator)
    advantages = torch.randn(B, generator=generator)

    theirs = log_probs.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (theirs, torch.zeros(B, T), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        _entropy_bonus_enabled=False,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.28,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(gather=lambda value: value, reduce=lambda value, *args, **kwargs: value),
        _metrics={"train": _Anything()},
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": MASK,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
    }
    expected = GRPOTrainer._compute_loss(trainer, None, inputs)
    expected.backward()

    ours = log_probs[ACTIVE].clone().requires_grad_()
    repeated = torch.repeat_interleave(advantages, LENGTHS)
    loss = clipped_policy_gradient(ours, repeated, old[ACTIVE], weights(aggregation))
    loss = loss + beta * reference_kl(ours, reference[ACTIVE], weights(aggregation))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad[ACTIVE])
    ratio = torch.exp(log_probs - old)[ACTIVE]
    assert ((ratio > 1.28) & (repeated > 0)).any(), "the clipping must have been at work"


class _Anything(dict):
    """TRL's metrics are lists that come into being when they are used."""

    def __missing__(self, name):
        self[name] = []
        return self[name]


def states() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(B, T, H, generator=generator), torch.randn(B, T, H, generator=generator)
    return student, teacher, torch.randn(V, H, generator=generator)


@pytest.mark.parametrize(("kind", "alpha"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("js", 0.5), ("js", 0.2)])
@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("importance_clip", [None, 1.5])
def test_sdpo_equals_trl(kind, alpha, top_k, importance_clip):
    student, teacher, weight = states()
    generator = torch.Generator().manual_seed(2)
    written = torch.randint(V, (B, T), generator=generator)
    current = (student @ weight.T).log_softmax(-1).gather(-1, written[..., None])[..., 0]
    old = current + torch.randn(B, T, generator=generator)
    theirs = student.clone().requires_grad_()
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            distillation_mode="full_logits" if top_k is None else "topk_logits",
            distillation_topk=top_k,
            distillation_alpha=alpha,
            distillation_add_tail=True,
            distillation_is_clip=importance_clip,
        ),
        _log_self_distillation_metric=lambda mode, value: None,
        accelerator=SimpleNamespace(gather=lambda value: value, reduce=lambda value, *args, **kwargs: value),
    )
    logits = DistillationLogits(
        completion_ids=written,
        completion_mask=MASK,
        loss_mask=MASK,
        student_logits=theirs @ weight.T,
        teacher_logits=teacher @ weight.T,
    )
    inputs = {"old_per_token_logps": old}
    expected = SDPOTrainer._compute_self_distillation_loss(trainer, SimpleNamespace(training=True), inputs, logits)
    expected.backward()

    ours = student[ACTIVE].clone().requires_grad_()
    loss = divergence(
        ours,
        teacher[ACTIVE],
        Head(weight),
        token_weights=weights("sequence_mean"),
        targets=written[ACTIVE],
        old_log_probs=None if importance_clip is None else old[ACTIVE],
        importance_clip=importance_clip,
        kind=kind,
        alpha=alpha or 0.5,
        top_k=top_k,
    )
    loss.total.backward()
    torch.testing.assert_close(loss.total, expected)
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad[ACTIVE], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("js", 0.5), ("js", 0.9)])
def test_divergences_equal_trls_generalized_jsd(kind, beta):
    student, teacher, weight = states()
    theirs = student.clone().requires_grad_()
    labels = torch.where(ACTIVE, 0, -100)
    expected = GKDTrainer.generalized_jsd_loss(
        theirs @ weight.T, teacher @ weight.T, labels=labels, beta=beta, temperature=0.7, reduction="sum"
    )
    expected.backward()
    ours = student[ACTIVE].clone().requires_grad_()
    loss = divergence(ours, teacher[ACTIVE], Head(weight), kind=kind, alpha=beta or 0.5, temperature=0.7)
    loss.total.backward()
    torch.testing.assert_close(loss.total, expected)
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad[ACTIVE], rtol=1e-4, atol=1e-5)
