"""What a scoring pass reads: log-probabilities, entropies and hidden states of completion tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vpd.losses import divergence
from vpd.policy.objectives.base import Forward, Objective, Outputs, batch_log_probs, scored_states


@dataclass(frozen=True)
class TokenLogProbs(Objective):
    """``values["log_probs"]`` [S] of the completion tokens, and with ``entropy`` also ``values["entropy"]`` [S]."""

    temperature: float
    entropy: bool = False

    def __call__(self, forward: Forward) -> Outputs:
        values = {"log_probs": batch_log_probs(forward, self.temperature)}
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
