"""Keeps second sets of weights for the options that need them, such as the initial model or a running average."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vpd.losses import Head
from vpd.policy.architecture import head_of
from vpd.policy.module import PolicyModule

INITIAL, AVERAGE, PREVIOUS = "initial", "average", "previous"
"""The names of the copies: the policy as it was before training, its running average, and the policy as it was when it
was last extrapolated."""


def make_copies(policy: PolicyModule, rates: Mapping[str, float]) -> dict[str, WeightCopy]:
    """Make a copy for each name, with the rate at which every rollout batch pulls it towards the policy."""
    return {name: WeightCopy(policy, rate) for name, rate in rates.items()}


class WeightCopy:
    """A frozen copy of the policy.

    It shares weights that are not trained with the policy, so that with adapters only these are copied. Make it before
    the policy is prepared for training, since accelerate's wrapping is bound to the one module.

    Args:
        policy: The policy to copy.
        rate: How far each rollout batch pulls the copy towards the trained weights; 0 keeps it as it was assigned.
    """

    def __init__(self, policy: PolicyModule, rate: float = 0.0) -> None:
        frozen = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
        self.rate = rate
        self._trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
        self.module: PolicyModule = copy.deepcopy(policy, dict(frozen)).requires_grad_(False).eval()

    @property
    def head(self) -> Head:
        return head_of(self.module.model)

    def to(self, device: torch.device) -> None:
        self.module.to(device)

    @torch.no_grad()
    def assign(self, policy: nn.Module) -> None:
        """Take over the policy's weights as they are now."""
        self._pull(policy, 1.0)

    @torch.no_grad()
    def follow(self, policy: nn.Module) -> None:
        """Move by ``rate`` towards the policy's weights, after a rollout batch's updates."""
        if self.rate:
            self._pull(policy, self.rate)

    def trained(self, policy: nn.Module) -> dict[str, nn.Parameter]:
        """Return those of a policy's parameters that the copy does not share, by name."""
        parameters = dict(policy.named_parameters())
        return {name: parameters[name] for name in self._trained}

    def _pull(self, policy: nn.Module, rate: float) -> None:
        theirs = self.trained(policy)
        for name, own in self.trained(self.module).items():
            own.lerp_(theirs[name].to(own), rate)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copied weights, for a checkpoint."""
        return dict(self.trained(self.module))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = dict(self.module.named_parameters())
        for name, value in state.items():
            own[name].copy_(value)
