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
    """A linear layer without gradient that computes from a rearranged copy of its weight, and never reads ``weight``
    itself; :func:`make_packable` makes it."""

    packed: torch.Tensor

    def pack(self, weight: torch.Tensor) -> None:
        """Rearrange ``weight`` [out, in], of any float dtype; to be repeated when it changes."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), ROWS)

    def unpack(self) -> None:
        """Free the copy; the layer computes nothing until the next :meth:`pack`."""
        if hasattr(self, "packed"):
            del self.packed

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


def make_packable(model: nn.Module) -> dict[str, PackedLinear]:
    """Turn all bfloat16 linear layers of ``model`` into such that compute from rearranged weights, not yet made.

    Subclasses of ``nn.Linear`` are left alone, and so is everything where oneDNN does not compute bfloat16.

    Returns:
        Them, by name.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return {}
    layers = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu":
            # The class alone changes: names, parameters, ties and hooks stay those of the layer.
            module.__class__ = PackedLinear
            assert isinstance(module, PackedLinear)
            layers[name] = module
    return layers
