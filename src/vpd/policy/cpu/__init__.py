"""How the network computes and keeps its layers on a CPU, behind two functions that the general path calls.

:func:`optimise` changes layers of a network once, when it is prepared; :func:`recompute` is entered for each training
pass. Both give the same numbers as transformers' own layers and autograd but for rounding, in less time and memory.
:func:`keep_freed_memory` is a setting of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn

from vpd.config import ModelSettings
from vpd.device import optimises_layers
from vpd.policy.cpu.allocator import keep_freed_memory
from vpd.policy.cpu.embedding import fuse_embedding
from vpd.policy.cpu.last_layer import trim_last_layer
from vpd.policy.cpu.mlp import fuse_mlps
from vpd.policy.cpu.norms import fuse_norms
from vpd.policy.cpu.rotary import fuse_rotary
from vpd.policy.cpu.saved_tensors import recompute

__all__ = ["OPTIMISATIONS", "keep_freed_memory", "optimise", "recompute"]

OPTIMISATIONS: dict[str, Callable[[nn.Module], int]] = {
    "norms": fuse_norms,
    "rotary": fuse_rotary,
    "mlps": fuse_mlps,
    "embedding": fuse_embedding,
    # The last layer's hooks stand on modules that the others replace.
    "last_layer": trim_last_layer,
}
"""What :func:`optimise` does, by name and in this order. Each function returns how many modules it has changed."""


def optimise(network: nn.Module, settings: ModelSettings, skip: Collection[str] = ()) -> dict[str, int]:
    """Let the network's layers compute as this package describes, for good.

    Layers of another build stay as they are. Where the settings or an accelerator forbid it, all do.

    Args:
        network: A causal language model, PEFT-wrapped or not, on the CPU.
        settings: The settings of the model, which may turn it off.
        skip: The names of :data:`OPTIMISATIONS` that are left out, such as one whose gain is to be measured.

    Returns:
        How many modules each optimisation has changed, by name; nothing where all are off.

    Raises:
        ValueError: There is no optimisation of a name in ``skip``.
    """
    if unknown := set(skip) - set(OPTIMISATIONS):
        raise ValueError(
            f"There is no optimisation {', '.join(sorted(unknown))} to skip; there are {', '.join(OPTIMISATIONS)}."
        )
    if not optimises_layers(settings):
        return {}
    return {name: change(network) for name, change in OPTIMISATIONS.items() if name not in skip}
