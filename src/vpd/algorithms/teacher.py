"""Which network plays the teacher, and how its predictions are read.

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
        view: The sequences that it reads.
        copies: The copies of the trained weights that it needs; see :meth:`Algorithm.weight_copies`.
        reads: How many passes it makes.
        is_frozen: Whether it is read once for the whole batch, before the first update.
    """

    view: View[Example] = teacher_view
    copies: Mapping[str, float] = {}
    reads: int = 1
    is_frozen: bool = False

    def __init__(self, settings: MStepSettings) -> None:
        self.settings = settings

    def reuses_keys(self, learner: Learner) -> bool:
        """Whether its pass is conditioned on the keys and values of the student's, within the same forward."""
        return False

    @abstractmethod
    def read(self, learner: Learner, examples: Sequence[Example]) -> ScoredStates:
        """Make the teacher's own pass over rollouts that have one; every process must, also with no rollouts."""

    def _states(
        self, learner: Learner, examples: Sequence[Example], network: PolicyModule | None = None
    ) -> ScoredStates:
        batch = learner.pack(examples, self.view, network=network)
        return states_of(learner.score(batch, wanted_states(self.settings), network).values)


class LiveTeacher(Teacher):
    """The network as it is at each minibatch, with its own adapter on where it has one."""

    def reuses_keys(self, learner: Learner) -> bool:
        """The student's pass gives keys and values wherever the network allows it."""
        return learner.reuses_keys

    def read(self, learner: Learner, examples: Sequence[Example]) -> ScoredStates:
        return self._states(learner, examples)


class AdaptedTeacher(LiveTeacher):
    """The network with the adapter of the teacher's own, which the student's pass does not have."""

    def reuses_keys(self, learner: Learner) -> bool:
        return False


class FrozenTeacher(AdaptedTeacher):
    """The network as it was before the first update of the batch."""

    is_frozen = True


class AveragedTeacher(Teacher):
    """A running average of the network."""

    def __init__(self, settings: MStepSettings) -> None:
        super().__init__(settings)
        self.copies = {AVERAGE: settings.ema_rate}

    def read(self, learner: Learner, examples: Sequence[Example]) -> ScoredStates:
        average = learner.copies[AVERAGE]
        return replace(self._states(learner, examples, average.module), head=average.head)


class TrustRegionTeacher(Teacher):
    """Logits mixed from the initial network and the live one."""

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
    """The teacher that ``settings.teacher`` names."""
    return _TEACHERS[settings.teacher](settings)


def wanted_states(settings: MStepSettings) -> ReadStates:
    """What is read of the teacher: the states that predict completion tokens, and those of matched layers."""
    return ReadStates(settings.representation_layers if settings.representation_weight else ())


def states_of(values: Mapping[str, Tensor]) -> ScoredStates:
    """What a pass of :func:`wanted_states` gave; nothing where the batch was empty."""
    empty = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    return ScoredStates(values.get("hidden", empty[0]), values.get("rows", empty[1]))


def kept_head(head: Head) -> Head:
    """The head as it is now, whatever later updates do to the network's."""
    bias = None if head.bias is None else head.bias.detach().clone()
    return replace(head, weight=head.weight.detach().clone(), bias=bias)


def mixed_head(initial: Head, live: Head, share: float) -> Head:
    """One head for both networks' hidden states side by side, whose logits are (1 - share) initial + share live."""
    if initial.softcap is not None:
        raise ConfigError('algorithm.teacher = "trust_region" is not offered for models that cap their logits.')
    shares = ((1.0 - share, initial), (share, live))
    weight = torch.cat([part * head.weight.detach().float() for part, head in shares], dim=1)
    bias = None
    if initial.bias is not None and live.bias is not None:
        bias = (1.0 - share) * initial.bias.detach().float() + share * live.bias.detach().float()
    return Head(weight, bias, initial.scale)
