"""Tells which modules of a network may be replaced by others that compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody has given this module a forward of its own or hooks, which a replacement would not have."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in vars(module) and not any(hooks)


def only_projects(layer: nn.Module) -> bool:
    """Whether all matrices of a layer belong to linear modules: experts and their routers often hold bare ones."""
    return all(
        isinstance(module, nn.Linear)
        for module in layer.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 1
    )


@contextmanager
def keeping_modes(module: nn.Module) -> Iterator[None]:
    """Afterwards the module and all modules within it are in training or in evaluation as they were before."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
