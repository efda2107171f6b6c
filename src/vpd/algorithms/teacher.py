"""Which network plays the teacher behind the feedback prompt, and how its predictions are read.

live            the network as it is at each minibatch
frozen          the network as it was after the E-step, for all minibatches of the batch
ema             a running average of the network
lora            the network with the adapter that E-steps train
trust_region    logits = (1 - m) initial(x, C) + m live(x, C)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vpd.algorithms.example import Example, teacher_view
from vpd.config import ConfigError, MStepSettings
from vpd.losses import Head
from vpd.packing import PackedBatch
from vpd.policy.architecture import head_of
from vpd.policy.copies import AVERAGE, INITIAL
from vpd.policy.learner import Learner
from vpd.policy.objectives import PredictorStates, TeacherStates


def borrows(learner: Learner, settings: MStepSettings) -> bool:
    """Whether the teacher is the very network that reads the student's prompts, so that it need not read them again."""
    return settings.teacher == "live" and learner.lends_keys


def read_teacher_behind(
    learner: Learner, taught: list[Example], settings: MStepSettings, student: PackedBatch
) -> TeacherStates:
    """The pass of a teacher that :func:`borrows`, within the student's and behind what their prompts have in common."""
    return _states(learner.score_behind(taught, teacher_view, student, _wanted(settings)).values)


def read_teacher(learner: Learner, taught: list[Example], settings: MStepSettings) -> TeacherStates:
    """One pass of the teacher over rollouts that have one, or two where two networks are mixed."""
    batch = learner.pack(taught, teacher_view)
    states = _wanted(settings)
    if settings.teacher == "ema":
        average = learner.copies[AVERAGE]
        return _states(learner.score(batch, states, average).values, average.head)
    live = learner.score(batch, states).values
    if settings.teacher != "trust_region":
        return _states(live)
    initial = learner.copies[INITIAL]
    values = learner.score(batch, states, initial).values
    if not taught:
        return _states(live)
    head = mixed_head(initial.head, head_of(learner.module.model), settings.trust_region_share)
    return TeacherStates(torch.cat([values["hidden"].float(), live["hidden"].float()], dim=1), live["rows"], head)


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


def _wanted(settings: MStepSettings) -> PredictorStates:
    return PredictorStates(settings.representation_layers if settings.representation_weight else ())


def _states(values: dict[str, Tensor], head: Head | None = None) -> TeacherStates:
    empty = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    return TeacherStates(values.get("hidden", empty[0]), values.get("rows", empty[1]), head)
