"""What the policy module computes from its passes: losses and numbers of tokens.

An objective is a plain function of :class:`Forward`: the hidden states [T, H] of the packed tokens, the model's head,
and what the conditioned pass gave where there is one. Scored tokens (S of them) that share a packed row are computed
once, since completions of a group often begin alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

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
    measure_margin,
    reference_kl,
    sampled_divergence,
    token_log_probs,
)
from vpd.packing import PackedBatch


@dataclass(slots=True)
class Outputs:
    """The result of an objective.

    Attributes:
        loss: A scalar, where the objective has one.
        values: Detached numbers by name.
    """

    loss: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredStates:
    """The hidden states that predict the completion tokens of some rollouts, before the head.

    Attributes:
        hidden: [U, H'], the distinct ones.
        rows: [S], the index among them that predicts each completion token.
        head: The head that maps them to logits; None for the policy's own.
    """

    hidden: Tensor
    rows: Tensor
    head: Head | None = None


@dataclass(frozen=True)
class Forward:
    """What the passes of one forward gave.

    Attributes:
        hidden: [T, H'], the hidden states of the batch's packed tokens.
        head: The policy's head.
        batch: What was run.
        conditioned: The states of the pass without gradient that was conditioned on the batch's keys and values; None
            where there was none, or where it held no tokens.
        chunk_size: How many tokens' logits may exist at a time.
    """

    hidden: Tensor
    head: Head
    batch: PackedBatch
    conditioned: ScoredStates | None
    chunk_size: int


class Objective(ABC):
    """What to compute from a forward.

    Attributes:
        layers: The layers whose outputs stand beside the last hidden states, counted from 1; None for all.
    """

    layers: Sequence[int] | None = ()

    @abstractmethod
    def __call__(self, forward: Forward) -> Outputs: ...


def scored_states(hidden: Tensor, batch: PackedBatch) -> ScoredStates:
    """Pick the states that predict the batch's completion tokens from all of its hidden states [T, H']."""
    (rows,), inverse = _distinct(batch.predictor)
    return ScoredStates(hidden.index_select(0, rows), inverse)


def _distinct(*columns: Tensor) -> tuple[list[Tensor], Tensor]:
    """The distinct rows of integer columns [S], and for each entry the index of its row among them."""
    code = columns[0]
    for column in columns[1:]:
        code = code * (int(column.max()) + 1 if column.numel() else 1) + column
    _, inverse, counts = torch.unique(code, return_inverse=True, return_counts=True)
    # A stable sort puts the first entry of each distinct row at the start of its run.
    first = torch.argsort(inverse, stable=True)[torch.cumsum(counts, 0) - counts]
    return [column[first] for column in columns], inverse


def _log_probs(
    hidden: Tensor, rows: Tensor, head: Head, targets: Tensor, temperature: float, chunk_size: int
) -> Tensor:
    """The log-probability [S] of each target [S], which ``hidden[rows]`` [S, H] predicts."""
    (distinct_rows, distinct_targets), inverse = _distinct(rows, targets)
    states = hidden.index_select(0, distinct_rows)
    return token_log_probs(states, head, distinct_targets, temperature=temperature, chunk_size=chunk_size)[inverse]


def _batch_log_probs(forward: Forward, temperature: float) -> Tensor:
    """The log-probability [S] of every completion token of the batch."""
    batch = forward.batch
    return _log_probs(forward.hidden, batch.predictor, forward.head, batch.targets, temperature, forward.chunk_size)


def _per_rollout(values: Tensor, batch: PackedBatch) -> Tensor:
    """Token values [S] summed over each rollout's completion tokens, those of all its turns: [B]."""
    return values.new_zeros(batch.rollout_count).index_add(0, batch.rollout, values)


@dataclass(frozen=True)
class TokenLogProbs(Objective):
    """``values["log_probs"]`` [S] of the completion tokens, and with ``entropy`` also ``values["entropy"]`` [S]."""

    temperature: float
    entropy: bool = False

    def __call__(self, forward: Forward) -> Outputs:
        values = {"log_probs": _batch_log_probs(forward, self.temperature)}
        if self.entropy:
            scored = scored_states(forward.hidden, forward.batch)
            same = divergence(
                scored.hidden,
                scored.hidden,
                forward.head,
                temperature=self.temperature,
                chunk_size=forward.chunk_size,
            )
            values["entropy"] = same.entropy[scored.rows]
        return Outputs(values=values)


@dataclass(frozen=True)
class ReadStates(Objective):
    """The states that predict the completion tokens: ``values["hidden"]`` [U, H'] and ``values["rows"]`` [S].

    Attributes:
        layers: The layers whose outputs stand beside the last states; None for all.
    """

    layers: Sequence[int] | None = ()

    def __call__(self, forward: Forward) -> Outputs:
        scored = scored_states(forward.hidden, forward.batch)
        return Outputs(values={"hidden": scored.hidden, "rows": scored.rows})


@dataclass(frozen=True)
class Imitate(Objective):
    """The negative log-likelihood of the completions.

    Attributes:
        token_count: The number of completion tokens of the minibatch, over all processes, which divides each token.
    """

    token_count: int

    def __call__(self, forward: Forward) -> Outputs:
        return Outputs(loss=-_batch_log_probs(forward, temperature=1.0).sum() / self.token_count)


@dataclass(frozen=True)
class ShiftRule:
    """How delta follows from the implicit rewards of a whole E-batch (VPD, Algorithm 1, line 12).

    Attributes:
        total: Sums numbers over all processes. It is the one place where a loss needs them: delta is a mean over the
            E-batch, which may be known only once the first pass of the E-step has been made.
        momentum: The share of the previous delta that stays.
        previous: The previous E-step's delta; None where there was none.
    """

    total: Callable[..., list[float]]
    momentum: float = 0.0
    previous: float | None = None

    def __call__(self, rewards: Tensor, is_success: Tensor) -> float:
        """delta from the implicit rewards [B] of all of this process's rollouts."""
        shift = measure_margin(self.total, rewards.detach().float().cpu(), is_success).reward_shift
        return shift if self.previous is None else shift + self.momentum * (self.previous - shift)


@dataclass(frozen=True)
class Refine(Objective):
    """The E-step's loss: BCO on the implicit rewards of teacher sequences (VPD, Algorithm 1).

    ``values`` hold ``rewards`` [B], the implicit rewards, ``prior`` [B], log pi_prior(y|x), and ``shift`` [], delta.

    Attributes:
        prior_log_probs: [B], log pi_prior(y|x), without gradient. None takes it from the conditioned pass, which then
            is the student's.
        is_success: [B] bool.
        shift: delta, a constant of the E-step. Its rule stands here where it is not known yet: then this pass must hold
            the whole E-batch of each process.
        success_count, failure_count: The classes' sizes in the whole E-batch, over all processes.
        betas: [B], the temperature of each rollout's implicit reward.
        temperature: The temperature of the distributions.
    """

    prior_log_probs: Tensor | None
    is_success: Tensor
    shift: float | ShiftRule
    success_count: int
    failure_count: int
    betas: Tensor
    temperature: float

    def __call__(self, forward: Forward) -> Outputs:
        log_probs = _per_rollout(_batch_log_probs(forward, self.temperature), forward.batch)
        prior = self._conditioned_prior(forward) if self.prior_log_probs is None else self.prior_log_probs
        rewards = implicit_rewards(log_probs, prior.to(log_probs.device), self.betas.to(log_probs.device))
        shift = self.shift(rewards, self.is_success) if isinstance(self.shift, ShiftRule) else self.shift
        loss = bco_loss(
            rewards,
            self.is_success.to(log_probs.device),
            shift,
            success_count=self.success_count,
            failure_count=self.failure_count,
        )
        values = {"rewards": rewards.float(), "prior": prior, "shift": torch.tensor(shift, dtype=torch.float64)}
        return Outputs(loss=loss, values=values)

    @torch.no_grad()
    def _conditioned_prior(self, forward: Forward) -> Tensor:
        """log pi_prior(y|x) [B] from the conditioned pass, whose completion tokens are those of the batch."""
        states, targets = forward.conditioned, forward.batch.targets
        assert states is not None
        found = _log_probs(states.hidden, states.rows, forward.head, targets, self.temperature, forward.chunk_size)
        lengths = torch.bincount(forward.batch.rollout, minlength=forward.batch.rollout_count)
        return torch.stack([values.sum() for values in found.float().cpu().split(lengths.tolist())])


@dataclass(frozen=True)
class Distil(Objective):
    """The M-step's loss: the divergence between student and stop-gradient teacher at completion tokens.

    ``values`` hold, for each of the S tokens: ``divergence``, ``entropy`` (the student's), ``student_log_probs``,
    ``teacher_log_probs``, and ``representation`` where hidden states are matched, too.

    Attributes:
        teacher: What the teacher predicts for the same completion tokens; None takes the conditioned pass, which then
            is the teacher's.
        token_weights: [S], the weight of each completion token in the loss.
        settings: The divergence and its options.
        temperature: The temperature of both distributions.
        tokens: [S], the indices of the batch's completion tokens that have a teacher; None for all.
        old_log_probs: [S], the log-probabilities under the policy that wrote the tokens; None where it is the student
            as it is.
    """

    teacher: ScoredStates | None
    token_weights: Tensor
    settings: MStepSettings
    temperature: float
    tokens: Tensor | None = None
    old_log_probs: Tensor | None = None

    @property
    def layers(self) -> Sequence[int] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The layers whose states are matched; None for all."""
        return self.settings.representation_layers if self.settings.representation_weight else ()

    def __call__(self, forward: Forward) -> Outputs:
        aligned = self._align(forward)
        matching = self._match_representations(aligned)
        head, states, teacher_states = aligned.head, aligned.states, aligned.teacher_states
        if matching is not None:
            states, teacher_states = states[:, : aligned.head_width], teacher_states[:, : aligned.head_width]
        is_sampled = self.settings.divergence == "sampled"
        kind: DivergenceKind = "reverse_kl" if self.settings.divergence == "sampled" else self.settings.divergence
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_sampled):
            result = divergence(
                states,
                teacher_states,
                head,
                aligned.teacher_head,
                token_weights=aligned.weights,
                targets=aligned.targets,
                old_log_probs=None if is_sampled else aligned.distinct(aligned.old),
                importance_clip=self.settings.importance_clip,
                teacher_share=self.settings.teacher_share,
                kind=kind,
                alpha=self.settings.alpha,
                temperature=self.temperature,
                top_k=self.settings.top_k,
                support=self.settings.support,
                correction=self.settings.correction,
                chunk_size=forward.chunk_size,
            )
        values = {
            "divergence": result.per_token,
            "entropy": result.entropy,
            "student_log_probs": result.student_log_probs,
            "teacher_log_probs": result.teacher_log_probs,
        }
        values = {name: value[aligned.inverse] for name, value in values.items()}
        if matching is not None:
            values["representation"] = matching[1][aligned.inverse]
        addition = 0.0 if matching is None else self.settings.representation_weight * matching[0]
        loss = self._sampled(forward, aligned, states, values) if is_sampled else result.total
        return Outputs(loss=loss + addition, values=values)

    def _align(self, forward: Forward) -> _Aligned:
        """Bring the student's and the teacher's states of the same tokens together, each distinct pair once."""
        teacher = forward.conditioned if self.teacher is None else self.teacher
        assert teacher is not None
        columns = (forward.batch.predictor, forward.batch.targets)
        if self.tokens is not None:
            columns = tuple(column[self.tokens.to(column.device)] for column in columns)
        (rows, teacher_rows, targets), inverse = _distinct(columns[0], teacher.rows, columns[1])
        weights = self.token_weights.to(forward.hidden.device)
        weights = weights.new_zeros(rows.numel()).index_add(0, inverse, weights)
        # Another network's vocabulary may be padded otherwise.
        head = forward.head if teacher.head is None else forward.head.first(teacher.head.vocabulary_size)
        old = self.old_log_probs if self.settings.weighs_tokens else None
        return _Aligned(
            head=head,
            states=forward.hidden.index_select(0, rows),
            teacher_states=teacher.hidden.index_select(0, teacher_rows),
            teacher_head=teacher.head,
            weights=weights,
            targets=targets,
            inverse=inverse,
            old=None if old is None else old.to(forward.hidden.device),
            head_width=forward.head.weight.shape[1],
        )

    def _sampled(self, forward: Forward, aligned: _Aligned, states: Tensor, values: dict[str, Tensor]) -> Tensor:
        """The policy-gradient estimate from the tokens that were written."""
        log_probs = token_log_probs(
            states, aligned.head, aligned.targets, temperature=self.temperature, chunk_size=forward.chunk_size
        )
        return sampled_divergence(
            log_probs[aligned.inverse],
            values["teacher_log_probs"],
            self.token_weights.to(forward.hidden.device),
            old_log_probs=aligned.old,
            baseline=values["divergence"] if self.settings.control_variate else None,
            importance_clip=self.settings.importance_clip,
        )

    def _match_representations(self, aligned: _Aligned) -> tuple[Tensor, Tensor] | None:
        """The squared distance of the layers' states, a mean over layers and H: its weighted sum, and each token's."""
        if not self.settings.representation_weight:
            return None
        width = aligned.head_width
        distance = aligned.states[:, width:].float() - aligned.teacher_states[:, width:].float()
        per_token = distance.square().mean(-1)
        return torch.dot(aligned.weights, per_token), per_token.detach()


@dataclass(frozen=True)
class _Aligned:
    """The distinct triples (student's row, teacher's row, target) of S tokens, D of them.

    Attributes:
        head: The student's head, over the tokens that the teacher's head has, too.
        states, teacher_states: [D, H'] each.
        teacher_head: The teacher's head; None for the student's.
        weights: [D], summed over the tokens of each triple.
        targets: [D].
        inverse: [S], each token's triple.
        old: [S], old log-probabilities, or None.
        head_width: H, the width of the last hidden states, behind which those of layers stand.
    """

    head: Head
    states: Tensor
    teacher_states: Tensor
    teacher_head: Head | None
    weights: Tensor
    targets: Tensor
    inverse: Tensor
    old: Tensor | None
    head_width: int

    def distinct(self, values: Tensor | None) -> Tensor | None:
        """Token values [S] as values of triples [D]: each triple takes its first token's."""
        if values is None:
            return None
        places = torch.arange(len(values), device=values.device)
        first = places.new_full((len(self.targets),), len(values))
        return values[first.scatter_reduce(0, self.inverse, places, "amin")]


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """GRPO's clipped loss on the completion tokens; ``values["is_clipped"]`` [S] says where the ratio stopped counting.

    Attributes:
        advantages, old_log_probs, token_weights: [S] each.
        temperature: The temperature of the distribution.
        epsilon, epsilon_high: The bounds of the ratio.
        shaping: Makes the advantages [S] from the given ones and the log-ratio log q - log pi [S]; None leaves them.
        teacher_log_probs: [S], log q of each token for ``shaping``; nan where there is no teacher (a log-ratio of 0).
        reference_log_probs: [S], the log-probabilities under the initial model; None for no penalty.
        kl_weight: The weight of the penalty for leaving the initial model.
    """

    advantages: Tensor
    old_log_probs: Tensor
    token_weights: Tensor
    temperature: float
    epsilon: float
    epsilon_high: float
    shaping: Callable[[Tensor, Tensor], Tensor] | None = None
    teacher_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    kl_weight: float = 0.0

    def __call__(self, forward: Forward) -> Outputs:
        device = forward.hidden.device
        log_probs = _batch_log_probs(forward, self.temperature)
        current, old = log_probs.detach(), self.old_log_probs.to(device)
        advantages, weights = self.advantages.to(device), self.token_weights.to(device)
        if self.shaping is not None and self.teacher_log_probs is not None:
            log_ratio = (self.teacher_log_probs.to(device) - current).nan_to_num(nan=0.0)
            advantages = self.shaping(advantages, log_ratio)
        loss = clipped_policy_gradient(
            log_probs, advantages, old, weights, clip_low=self.epsilon, clip_high=self.epsilon_high
        )
        if self.reference_log_probs is not None:
            reference = self.reference_log_probs.to(device)
            loss = loss + self.kl_weight * reference_kl(log_probs, reference, weights)
        ratio = torch.exp(current - old)
        outside = torch.where(advantages > 0, ratio > 1 + self.epsilon_high, ratio < 1 - self.epsilon)
        return Outputs(loss=loss, values={"is_clipped": outside & (advantages != 0)})


@dataclass(frozen=True)
class WeightedSum(Objective):
    """Several losses on the same tokens, each times its weight.

    Attributes:
        terms: The weights and the objectives; at most one of them may want layers.
    """

    terms: Sequence[tuple[float, Objective]]

    @property
    def layers(self) -> Sequence[int] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The layers whose states one of the terms wants; None for all."""
        return next((term.layers for _, term in self.terms if term.layers != ()), ())

    def __call__(self, forward: Forward) -> Outputs:
        last = replace(forward, hidden=forward.hidden[:, : forward.head.weight.shape[1]])
        outputs = [(weight, term(last if term.layers == () else forward)) for weight, term in self.terms]
        losses = [weight * output.loss for weight, output in outputs if output.loss is not None]
        values = {name: value for _, output in outputs for name, value in output.values.items()}
        return Outputs(loss=torch.stack(losses).sum(), values=values)
