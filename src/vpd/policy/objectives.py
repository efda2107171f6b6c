"""What to compute from a packed batch's hidden states, inside the policy module's forward.

Each objective is called with the hidden states [T, H] of the packed tokens, the model's head, the batch, and how many
tokens' logits may exist at a time, and returns :class:`Outputs`. Scored tokens (S of them) that share a packed row are
computed once, since completions of a group often begin alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vpd.config import MStepSettings
from vpd.losses import (
    DivergenceKind,
    Head,
    bco_loss,
    clipped_policy_gradient,
    divergence,
    implicit_rewards,
    reference_kl,
    sampled_divergence,
    token_log_probs,
)
from vpd.packing import PackedBatch


@dataclass(slots=True)
class Outputs:
    """Result of an objective: a scalar ``loss`` where there is one, and detached numbers by name."""

    loss: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherStates:
    """What the teacher predicts at the completion tokens of some rollouts, before its head.

    Attributes:
        hidden: [U, H'], distinct ones only.
        rows: [S], which of them predicts each completion token.
        head: maps them to logits; None for the student's.
    """

    hidden: Tensor
    rows: Tensor
    head: Head | None = None


class Objective(Protocol):
    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch, chunk_size: int) -> Outputs: ...


def _distinct(*columns: Tensor) -> tuple[list[Tensor], Tensor]:
    """The distinct rows of integer columns [S], and for each entry the index of its row among them."""
    code = columns[0]
    for column in columns[1:]:
        code = code * (int(column.max()) + 1 if column.numel() else 1) + column
    _, inverse, counts = torch.unique(code, return_inverse=True, return_counts=True)
    # A stable sort puts the first entry of each distinct row at the start of its run.
    first = torch.argsort(inverse, stable=True)[torch.cumsum(counts, 0) - counts]
    return [column[first] for column in columns], inverse


def _log_probs(hidden: Tensor, head: Head, batch: PackedBatch, temperature: float, chunk_size: int) -> Tensor:
    """Log-probability [S] of every completion token."""
    (rows, targets), inverse = _distinct(batch.predictor, batch.targets)
    states = hidden.index_select(0, rows)
    return token_log_probs(states, head, targets, temperature=temperature, chunk_size=chunk_size)[inverse]


def _per_sequence(values: Tensor, batch: PackedBatch) -> Tensor:
    """Sum token values [S] within each sequence: [B]."""
    return values.new_zeros(batch.sequence_count).index_add(0, batch.sequence, values)


@dataclass(frozen=True)
class TokenLogProbs:
    """``values["log_probs"]`` [S] of the completion tokens, and with ``entropy`` also ``values["entropy"]`` [S]."""

    temperature: float
    entropy: bool = False

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch, chunk_size: int) -> Outputs:
        values = {"log_probs": _log_probs(hidden, head, batch, self.temperature, chunk_size)}
        if self.entropy:
            (rows,), inverse = _distinct(batch.predictor)
            states = hidden.index_select(0, rows)
            same = divergence(states, states, head, temperature=self.temperature, chunk_size=chunk_size)
            values["entropy"] = same.entropy[inverse]
        return Outputs(values=values)


@dataclass(frozen=True)
class PredictorStates:
    """The hidden states that predict completion tokens: ``values["hidden"]`` [U, H], distinct ones only, and
    ``values["rows"]`` [S], which of them predicts each completion token.

    Attributes:
        layers: whose outputs to put behind the last states; None for all.
    """

    layers: Sequence[int] | None = ()

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch, chunk_size: int) -> Outputs:
        (rows,), inverse = _distinct(batch.predictor)
        return Outputs(values={"hidden": hidden.index_select(0, rows), "rows": inverse})


@dataclass(frozen=True)
class Imitate:
    """Negative log-likelihood of the completions, each token divided by ``token_count``, the minibatch's number."""

    token_count: int

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch, chunk_size: int) -> Outputs:
        log_probs = _log_probs(hidden, head, batch, temperature=1.0, chunk_size=chunk_size)
        return Outputs(loss=-log_probs.sum() / self.token_count)


@dataclass(frozen=True)
class Refine:
    """The E-step's loss: BCO on the implicit rewards of teacher sequences (VPD, Algorithm 1).

    Attributes:
        prior_log_probs: [B], log pi_prior(y|x), without gradient, or what reads it once the pass has been made.
        is_success: [B] bool.
        shift_from: gives delta, a constant of the E-step, from the implicit rewards [B] of this pass, which only the
            first pass of an E-step needs.
        success_count, failure_count: over the whole E-batch, all processes.
        betas: [B], the implicit reward's temperature.
    """

    prior_log_probs: Tensor | Callable[[], Tensor]
    is_success: Tensor
    shift_from: Callable[[Tensor], float]
    success_count: int
    failure_count: int
    betas: Tensor
    temperature: float

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch, chunk_size: int) -> Outputs:
        log_probs = _per_sequence(_log_probs(hidden, head, batch, self.temperature, chunk_size), batch)
        prior = self.prior_log_probs if isinstance(self.prior_log_probs, Tensor) else self.prior_log_probs()
        rewards = implicit_rewards(log_probs, prior.to(log_probs.device), self.betas.to(log_probs.device))
        loss = bco_loss(
            rewards,
            self.is_success.to(log_probs.device),
            self.shift_from(rewards),
            success_count=self.success_count,
            failure_count=self.failure_count,
        )
        return Outputs(loss=loss)


@dataclass(frozen=True)
class Distil:
    """The M-step's loss: divergence between student and stop-gradient teacher at the completion tokens that have one.

    Attributes:
        teacher: what it predicts for the same completions behind its own prompts, or a function that reads it once the
            student's pass has been made.
        token_weights: [S], the loss's weight of each completion token.
        settings: which divergence.
        tokens: which of the batch's completion tokens have a teacher, S of them; None for all.
        old_log_probs: [S], of the policy that wrote the tokens; None where it is the student as it is.
    """

    teacher: TeacherStates | Callable[[], TeacherStates]
    token_weights: Tensor
    settings: MStepSettings
    temperature: float
    tokens: Tensor | None = None
    old_log_probs: Tensor | None = None

    @property
    def layers(self) -> Sequence[int] | None:
        """The layers whose states are matched; None for all."""
        return self.settings.representation_layers if self.settings.representation_weight else ()

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch, chunk_size: int) -> Outputs:
        teacher = self.teacher if isinstance(self.teacher, TeacherStates) else self.teacher()
        columns = (batch.predictor, batch.targets)
        if self.tokens is not None:
            columns = tuple(column[self.tokens.to(column.device)] for column in columns)
        (rows, teacher_rows, targets), inverse = _distinct(columns[0], teacher.rows, columns[1])
        weights = self.token_weights.to(hidden.device)
        weights = weights.new_zeros(rows.numel()).index_add(0, inverse, weights)
        states, teacher_states = hidden.index_select(0, rows), teacher.hidden.index_select(0, teacher_rows)
        matching = self._representation(states, teacher_states, weights, head)
        if matching is not None:
            width = head.weight.shape[1]
            states, teacher_states = states[:, :width], teacher_states[:, :width]
        is_sampled = self.settings.divergence == "sampled"
        old = self.old_log_probs if self.settings.weighs_tokens else None
        old = None if old is None else old.to(hidden.device)
        distinct_old = None
        if old is not None and not is_sampled:
            places = torch.arange(len(old), device=old.device)
            first = places.new_full(rows.shape, len(old)).scatter_reduce(0, inverse, places, "amin")
            distinct_old = old[first]
        kind: DivergenceKind = "reverse_kl" if self.settings.divergence == "sampled" else self.settings.divergence
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_sampled):
            result = divergence(
                states,
                teacher_states,
                head,
                teacher.head,
                token_weights=weights,
                targets=targets,
                old_log_probs=distinct_old,
                importance_clip=self.settings.importance_clip,
                teacher_share=self.settings.teacher_share,
                kind=kind,
                alpha=self.settings.alpha,
                temperature=self.temperature,
                top_k=self.settings.top_k,
                support=self.settings.support,
                correction=self.settings.correction,
                chunk_size=chunk_size,
            )
        values = {
            "divergence": result.per_token,
            "entropy": result.entropy,
            "student_log_probs": result.student_log_probs,
            "teacher_log_probs": result.teacher_log_probs,
        }
        values = {name: value[inverse] for name, value in values.items()}
        if matching is not None:
            values["representation"] = matching[1][inverse]
        addition = 0.0 if matching is None else self.settings.representation_weight * matching[0]
        if not is_sampled:
            return Outputs(loss=result.total + addition, values=values)
        loss = sampled_divergence(
            token_log_probs(states, head, targets, temperature=self.temperature, chunk_size=chunk_size)[inverse],
            values["teacher_log_probs"],
            self.token_weights.to(hidden.device),
            old_log_probs=old,
            baseline=values["divergence"] if self.settings.control_variate else None,
            importance_clip=self.settings.importance_clip,
        )
        return Outputs(loss=loss + addition, values=values)

    def _representation(
        self, states: Tensor, teacher_states: Tensor, weights: Tensor, head: Head
    ) -> tuple[Tensor, Tensor] | None:
        """The squared distance of the layers' states, a mean over layers and H: weighted sum, and of each token."""
        if not self.settings.representation_weight:
            return None
        width = head.weight.shape[1]
        distance = states[:, width:].float() - teacher_states[:, width:].float()
        per_token = distance.square().mean(-1)
        return torch.dot(weights, per_token), per_token.detach()


@dataclass(frozen=True)
class PolicyGradient:
    """GRPO's clipped loss on the completion tokens.

    Attributes:
        advantages, old_log_probs, token_weights: [S].
        shape: makes the advantages [S] from the given ones and the teacher's lead, log q - log pi; None leaves them.
        teacher_log_probs: [S], log q of each token for ``shape``; nan where there is no teacher (a lead of 0).
        epsilon, epsilon_high: bounds of the ratio.
        reference_log_probs: [S], of the initial model; None for no penalty.
        kl_weight: of the penalty for leaving it.
    """

    advantages: Tensor
    old_log_probs: Tensor
    token_weights: Tensor
    temperature: float
    epsilon: float
    epsilon_high: float
    shape: Callable[[Tensor, Tensor], Tensor] | None = None
    teacher_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    kl_weight: float = 0.0

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch, chunk_size: int) -> Outputs:
        log_probs = _log_probs(hidden, head, batch, self.temperature, chunk_size)
        current, old = log_probs.detach(), self.old_log_probs.to(hidden.device)
        advantages = self.advantages.to(hidden.device)
        if self.shape is not None and self.teacher_log_probs is not None:
            lead = (self.teacher_log_probs.to(hidden.device) - current).nan_to_num(nan=0.0)
            advantages = self.shape(advantages, lead)
        loss = clipped_policy_gradient(
            log_probs,
            advantages,
            old,
            self.token_weights.to(hidden.device),
            clip_low=self.epsilon,
            clip_high=self.epsilon_high,
        )
        if self.reference_log_probs is not None:
            reference = self.reference_log_probs.to(hidden.device)
            loss = loss + self.kl_weight * reference_kl(log_probs, reference, self.token_weights.to(hidden.device))
        ratio = torch.exp(current - old)
        outside = torch.where(advantages > 0, ratio > 1 + self.epsilon_high, ratio < 1 - self.epsilon)
        return Outputs(loss=loss, values={"is_clipped": outside & (advantages != 0)})


@dataclass(frozen=True)
class WeightedSum:
    """Several losses on the same tokens, each times its weight."""

    terms: Sequence[tuple[float, Objective]]

    @property
    def layers(self) -> Sequence[int] | None:
        """The layers whose states one of the terms wants; None for all."""
        return next((wanted for _, term in self.terms if (wanted := getattr(term, "layers", ())) != ()), ())

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch, chunk_size: int) -> Outputs:
        last = hidden[:, : head.weight.shape[1]]
        outputs = [
            (weight, term(last if getattr(term, "layers", ()) == () else hidden, head, batch, chunk_size))
            for weight, term in self.terms
        ]
        losses = [weight * output.loss for weight, output in outputs if output.loss is not None]
        values = {name: value for _, output in outputs for name, value in output.values.items()}
        return Outputs(loss=torch.stack(losses).sum(), values=values)
