"""A last layer that computes its queries and its MLP only for the tokens that predict a completion's token.

For the other tokens, most of a prompt and of a feedback text, a packed batch needs the last layer's keys and values
only; nobody reads what follows them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vpd.packing import PackedLayout
from vpd.policy.architecture import backbone_of
from vpd.policy.cpu.replacing import keeping_modes, only_projects

_BY_ROW = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""The parts of the layer that compute each token by itself, all after its attention has been called."""


class ScoredRows:
    """Hooks by which the parts of the last layer compute the scored tokens of the pass under way.

    A part's input is narrowed to these tokens, and its output is widened again, with zeros for the others. The
    attention's hook comes first and is told of the batch, in the second pass of gradient checkpointing too.
    """

    def __init__(self) -> None:
        self._scored: Tensor | None = None
        self._token_count = 0

    def note(self, attention: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> None:
        """The attention's hook before its forward: takes the scored tokens from the layout, if there is one."""
        layout: PackedLayout | None = kwargs.get("packed")
        self._scored = None if layout is None else layout.scored
        self._token_count = 0 if layout is None else layout.token_count

    def narrow(self, part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
        """A part's hook before its forward: [1, T, in] to [1, scored, in]."""
        if self._scored is None or len(inputs) != 1:
            return None
        return (inputs[0].index_select(1, self._scored),)

    def widen(self, part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A part's hook after its forward: [1, scored, out] to [1, T, out]."""
        if self._scored is None or len(inputs) != 1:
            return None
        zeros = output.new_zeros(1, self._token_count, output.shape[-1])
        return zeros.index_copy(1, self._scored, output)


def trim_last_layer(model: nn.Module) -> int:
    """Let the last layer compute as this module describes in packed batches; return how many layers do, 1 or 0.

    The hidden states of tokens that predict nothing then mean nothing. Layers of another build stay as they are.

    Args:
        model: A language model on the CPU.
    """
    layers = getattr(backbone_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return 0
    last = layers[-1]
    try:
        parts = [last.get_submodule(name) for name in _BY_ROW]
    except AttributeError:
        return 0
    is_used_once = all(layer is not last for layer in list(layers)[:-1])
    is_trimmed = hasattr(last, "scored_rows")
    if is_trimmed or not (is_used_once and only_projects(last) and all(map(_takes_rows, parts))):
        return 0
    rows = ScoredRows()
    vars(last)["scored_rows"] = rows
    last.get_submodule("self_attn").register_forward_pre_hook(rows.note, with_kwargs=True)
    for part in parts:
        part.register_forward_pre_hook(rows.narrow)
        part.register_forward_hook(rows.widen)
    return 1


@torch.no_grad()
def _takes_rows(part: nn.Module) -> bool:
    """Whether the part makes one tensor of one tensor, each row by itself."""
    first = next((module for module in part.modules() if isinstance(module, nn.Linear)), None)
    if first is None:
        return False
    x = torch.linspace(-1.0, 1.0, 3 * first.in_features, dtype=first.weight.dtype).view(1, 3, -1)
    with keeping_modes(part):
        part.eval()
        try:
            together, alone = part(x), part(x[:, 1:2])
            return torch.allclose(together[:, 1:2].float(), alone.float(), rtol=1e-2, atol=1e-3)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return False
