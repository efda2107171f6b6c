"""bfloat16 linear layers for decoding on the processor, with weights laid out as its matrix units read them.

PyTorch's own linear layer hands oneDNN the weight row by row, and oneDNN rearranges it on every call. For the few rows
of a decoding step that takes as long as the product itself. The rearranged weight gives the same numbers.
"""

from __future__ import annotations

import torch
from torch import nn

ROWS = 64
"""Rows of input that the layout is chosen for: the layout for 1 row does not gain, that for 64 gains from 1 to 360."""


class PackedLinear(nn.Linear):
    """A linear layer without gradient that computes from a rearranged copy of its weight; see :func:`pack`."""

    packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


def pack(model: nn.Module) -> None:
    """Rearrange the current weights of all bfloat16 linear layers of ``model``; to be repeated when they change.

    Subclasses of ``nn.Linear`` are left alone, and so is everything where oneDNN does not compute bfloat16. It needs
    as much memory again as the weights.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu":
            # The class alone changes: names, parameters, ties and hooks stay those of the layer.
            module.__class__ = PackedLinear
        if isinstance(module, PackedLinear):
            module.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), ROWS)


def unpack(model: nn.Module) -> None:
    """Free what :func:`pack` has made; the layers compute nothing until it is called again."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            del module.packed
