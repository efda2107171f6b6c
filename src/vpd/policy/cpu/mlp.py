"""Gated MLPs that keep one tensor less for the backward pass, and make one less in the forward pass.

Where autograd multiplies silu(gate) with the up projection it keeps gate, silu(gate) and up, each as wide as the MLP's
inside: of what a layer keeps for its backward pass, silu(gate) is an eighth. Here it is made again from gate.
"""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

_PARTS = ("gate_proj", "up_proj", "down_proj")
_NAMES = {*_PARTS, "act_fn"}
"""All that a plain gated MLP's forward names: neither dropout nor a limit."""


def fuse_mlps(model: nn.Module) -> int:
    """Let the gated MLPs compute as this module describes, for good; return how many do.

    Where there is a GPU, none. MLPs that compute something else (another activation) stay as they are, and so do those
    that have a forward of their own.

    Args:
        model: a language model on the CPU.
    """
    if torch.accelerator.is_available():
        return 0
    count = 0
    for module in model.modules():
        if "forward" not in vars(module) and _is_gated(module):
            # On the instance, and under this name, as norms.py has it.
            module.forward = MethodType(forward, module)
            count += 1
    return count


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of tensors of one shape and dtype."""
    return _Gated.apply(gate, up)  # pyright: ignore[reportReturnType]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activated = None
        return F.silu(gate).mul_(up)

    @staticmethod
    def remake(ctx: Any) -> Tensor:
        """The output again; silu(gate) is kept for the backward pass, which comes next."""
        gate, up = ctx.saved_tensors
        ctx.activated = F.silu(gate)
        return ctx.activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        activated, ctx.activated = ctx.activated, None
        grad_up = (F.silu(gate) if activated is None else activated).mul_(grad_output)
        del activated
        grad_gate = torch.mul(grad_output, up)
        # Into its own input: number by number.
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up


def forward(mlp: Any, x: Tensor) -> Tensor:
    """The ``forward`` of a fused MLP: [..., H] to [..., H]."""
    return mlp.down_proj(gated(mlp.gate_proj(x), mlp.up_proj(x)))


@torch.no_grad()
def _is_gated(module: nn.Module) -> bool:
    """Whether the module computes of a tensor alone what :func:`forward` does, whatever its numbers."""
    function = type(module).forward
    is_plain = isinstance(function, FunctionType) and not hasattr(function, "__wrapped__")
    if not is_plain or set(function.__code__.co_names) != _NAMES or function.__code__.co_argcount != 2:
        return False
    if not isinstance(getattr(module, "act_fn", None), (nn.SiLU, type(ACT2FN["silu"]))):
        return False
    was_training = module.training
    module.eval()
    try:
        weight = module.get_submodule(_PARTS[0]).weight
        assert isinstance(weight, Tensor)
        x = torch.linspace(-2.0, 3.0, 2 * weight.shape[-1], dtype=weight.dtype).view(1, 2, -1)
        with torch.autocast("cpu", enabled=False):
            return torch.equal(module(x), forward(module, x))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError):
        return False
    finally:
        module.train(was_training)
