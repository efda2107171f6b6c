"""Says which network is the teacher, and how its predictions are read.

live            the network as it is at each minibatch
frozen          the network as it was after the E-step, for all minibatches of the batch
ema             a running average of the network
lora            the network with the adapter that E-steps train
trust_region    logits = (1 - m) initial(x, C) + m live(x, C)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vpd.algorithms.example import Example, teacher_view
from vpd.config import ConfigError, MStepSettings
from vpd.losses import Head
from vpd.policy.architecture import head_of
from vpd.policy.copies import AVERAGE, INITIAL
from vpd.policy.learner import Learner, View
from vpd.policy.module import PolicyModule
from vpd.policy.objectives import ReadStates, ScoredStates


class Teacher(ABC):
    """Predicts what the M-step distils.

    Attributes:
        view: The sequences that the teacher reads.
        copies: The copies of the trained weights that it needs; see :meth:`Algorithm.weight_copies`.
        reads: How many passes without gradient it makes for one batch.
        is_frozen: Whether it is read once for the whole batch, before the first update.
    """

    view: View[Example] = teacher_view
    copies: Mapping[str, float] = {}
    reads: int = 1
    is_frozen: bool = False

    def __init__(self, settings: MStepSettings) -> None:
        self.settings = settings

    def reuses_keys(self, learner: Learner) -> bool:
        """Tell whether its pass is conditioned on the student's pass, within the same forward (KV reuse)."""
        return False

    @abstractmethod
    def read(self, learner: Learner, examples: Sequence[Example]) -> ScoredStates:
        """Make the teacher's pass over rollouts that have a teacher. Every process must, even without rollouts."""

    def _states(
        self, learner: Learner, examples: Sequence[Example], network: PolicyModule | None = None
    ) -> ScoredStates:
        batch = learner.pack(examples, self.view, network=network)
        return states_of(learner.score(batch, wanted_states(self.settings), network).values)


class LiveTeacher(Teacher):
    """Predicts with the network as it is at each minibatch."""

    def reuses_keys(self, learner: Learner) -> bool:
        """Reuse the student's keys and values wherever the network allows it."""
        return learner.reuses_keys

    def read(self, learner: Learner, examples: Sequence[Example]) -> ScoredStates:
        return self._states(learner, examples)


class AdaptedTeacher(LiveTeacher):
    """Predicts with the network and the teacher's adapter, which the student's pass does not have."""

    def reuses_keys(self, learner: Learner) -> bool:
        return False


class FrozenTeacher(AdaptedTeacher):
    """Predicts with the network as it was before the first update of the batch."""

    is_frozen = True


class AveragedTeacher(Teacher):
    """Predicts with a running average of the network."""

    def __init__(self, settings: MStepSettings) -> None:
        super().__init__(settings)
        self.copies = {AVERAGE: settings.ema_rate}

    def read(self, learner: Learner, examples: Sequence[Example]) -> ScoredStates:
        average = learner.copies[AVERAGE]
        return replace(self._states(learner, examples, average.module), head=average.head)


class TrustRegionTeacher(Teacher):
    """Predicts with logits mixed from the initial network and the live one."""

    copies: Mapping[str, float] = {INITIAL: 0.0}
    reads = 2

    def read(self, learner: Learner, examples: Sequence[Example]) -> ScoredStates:
        live = self._states(learner, examples)
        initial = learner.copies[INITIAL]
        frozen = self._states(learner, examples, initial.module)
        if not examples:
            return live
        head = mixed_head(initial.head, head_of(learner.module.model), self.settings.trust_region_share)
        return ScoredStates(torch.cat([frozen.hidden.float(), live.hidden.float()], dim=1), live.rows, head)


_TEACHERS: dict[str, type[Teacher]] = {
    "live": LiveTeacher,
    "frozen": FrozenTeacher,
    "ema": AveragedTeacher,
    "trust_region": TrustRegionTeacher,
    "lora": AdaptedTeacher,
}


def make_teacher(settings: MStepSettings) -> Teacher:
    """Make the teacher that ``settings.teacher`` names."""
    return _TEACHERS[settings.teacher](settings)


def wanted_states(settings: MStepSettings) -> ReadStates:
    """Ask for the states that predict completion tokens, and for those of matched layers."""
    return ReadStates(settings.representation_layers if settings.representation_weight else ())


def states_of(values: Mapping[str, Tensor]) -> ScoredStates:
    """Return the states from a pass of :func:`wanted_states`; they are empty where the batch was."""
    empty = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    return ScoredStates(values.get("hidden", empty[0]), values.get("rows", empty[1]))


def kept_head(head: Head) -> Head:
    """Copy the head as it is now, so that later updates of the network leave it alone."""
    bias = None if head.bias is None else head.bias.detach().clone()
    return replace(head, weight=head.weight.detach().clone(), bias=bias)


def mixed_head(initial: Head, live: Head, share: float) -> Head:
    """Make one head for both networks' hidden states side by side: its logits are (1 - share) initial + share live."""
    if initial.softcap is not None:
        raise ConfigError('algorithm.teacher = "trust_region" is not offered for models that cap their logits.')
    shares = ((1.0 - share, initial), (share, live))
    weight = torch.cat([part * head.weight.detach().float() for part, head in shares], dim=1)
    bias = None
    if initial.bias is not None and live.bias is not None:
        bias = (1.0 - share) * initial.bias.detach().float() + share * live.bias.detach().float()
    return Head(weight, bias, initial.scale)
