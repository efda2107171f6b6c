"""Gated MLPs that keep one tensor less for the backward pass, and make one less in the forward pass.

Where autograd multiplies silu(gate) with the up projection it keeps gate, silu(gate) and up, each as wide as the MLP's
inside. silu(gate) is an eighth of what a layer keeps for its backward pass; here it is recomputed from gate.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

from vpd.policy.cpu.replacing import is_untouched, keeping_modes

_PARTS = ("gate_proj", "up_proj", "down_proj")


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)).

    Args:
        mlp: The module whose place it takes and whose projections it shares.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(mlp.get_submodule, _PARTS)
        self.training = mlp.training

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


def fuse_mlps(model: nn.Module) -> int:
    """Replace the gated MLPs by :class:`GatedMLP`; return how many were replaced.

    MLPs that compute something else (with another activation, a limit or dropout of their own) stay as they are, and so
    do those with hooks or a forward of their own.

    Args:
        model: A language model on the CPU.
    """
    count = 0
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if is_untouched(module) and _is_gated(module):
                setattr(parent, name, GatedMLP(module))
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
    def recompute(ctx: Any) -> Tensor:
        """The output; silu(gate) is kept for the backward pass of this function, which comes next."""
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
        # The result replaces its input, number by number.
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up


@torch.no_grad()
def _is_gated(module: nn.Module) -> bool:
    """Whether the module computes what :class:`GatedMLP` does, in training and in evaluation.

    It is tried on small and on very large numbers, which a limit would change. Both draw the same random numbers, so
    that dropout within the projections makes no difference and any other dropout does.
    """
    is_silu = isinstance(getattr(module, "act_fn", None), (nn.SiLU, type(ACT2FN["silu"])))
    if not is_silu or len(inspect.signature(module.forward).parameters) != 1:
        return False
    with keeping_modes(module):
        try:
            replacement = GatedMLP(module)
            weight = replacement.gate_proj.weight
            assert isinstance(weight, Tensor)
            small = torch.linspace(-2.0, 3.0, 2 * weight.shape[-1], dtype=weight.dtype).view(1, 2, -1)
            x = torch.cat([small, 1e6 * small], dim=1)
            return all(torch.equal(*_outputs(module, replacement, x, training)) for training in (True, False))
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError):
            return False


def _outputs(left: nn.Module, right: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    outputs = []
    for module in (left.train(training), right.train(training)):
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            outputs.append(module(x))
    return outputs
