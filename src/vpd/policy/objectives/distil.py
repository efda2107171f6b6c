"""The M-step's loss: the divergence between student and teacher at completion tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpd.config import MStepSettings
from vpd.losses import DivergenceKind, Head, divergence, sampled_divergence, token_log_probs
from vpd.policy.objectives.base import Forward, Objective, Outputs, ScoredStates, distinct_rows


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
        (rows, teacher_rows, targets), inverse = distinct_rows(columns[0], teacher.rows, columns[1])
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
        head_width: H, the width of the last hidden states, which those of layers follow in the same row.
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
