"""bfloat16 linear layers for decoding on the CPU, with weights laid out as its matrix units read them.

PyTorch's own linear layer hands oneDNN the weight row by row, and oneDNN rearranges it in every call. For the few rows
of a decoding step that takes as long as the product itself. The rearranged weight gives the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpd.device import is_cpu, rearranges_weights

ROWS = 64
"""How many rows of input the layout is chosen for: that for 1 row gains nothing, that for 64 gains from 1 to 360."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class RearrangedLinear(nn.Linear):
    """A linear layer without gradient that computes from a rearranged copy of its weight and never reads ``weight``.

    Args:
        linear: The layer whose place it takes. Its parameters are shared, and its hooks are taken over.
    """

    rearranged: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        for hooks in _HOOKS:
            getattr(self, hooks).update(getattr(linear, hooks))

    def rearrange(self, weight: Tensor) -> None:
        """Rearrange ``weight`` [out, in], of any float dtype; to be repeated when it changes."""
        self.rearranged = torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), ROWS)

    def release(self) -> None:
        """Free the rearranged copy; the layer computes nothing until the next :meth:`rearrange`."""
        if hasattr(self, "rearranged"):
            del self.rearranged

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(input, self.rearranged, self.bias, "none", [], "")


def rearrange_linears(model: nn.Module) -> dict[str, RearrangedLinear]:
    """Replace the bfloat16 linear layers within ``model`` by such that compute from rearranged weights, not yet made.

    Subclasses of ``nn.Linear`` stay as they are, and so do all layers where oneDNN does not compute bfloat16.

    Returns:
        The new layers, by name.
    """
    if not rearranges_weights():
        return {}
    layers = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and is_cpu(module.weight):
            layers[name] = RearrangedLinear(module)
            model.set_submodule(name, layers[name])
    return layers
