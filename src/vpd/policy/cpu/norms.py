"""RMS norms that go over their rows once, and hand the products after them what autocast would make of it anyway.

Each operation of transformers' norm makes a tensor as large as its input, in float32, and under autocast each of the
projections after it casts the result to bfloat16 for itself. Here a tile of rows stays in the CPU's cache from the
first operation to the last, the result is cast once, and the backward pass needs the input and one number for each row.
The projections' gradients are then added up in bfloat16, where they were cast first. On a CPU without native bfloat16
only the passes over memory are saved.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vpd.device import is_cpu
from vpd.policy.cpu.replacing import is_untouched, only_projects

TILE_NUMBERS = 2**17
"""How many numbers a core works on at a time: half a megabyte in float32."""

_READ_BY_PROJECTIONS = ("input_layernorm", "post_attention_layernorm")
"""The norms whose results attention and MLP read; in other layers the residual stream gets a norm's result."""

_NORMS_ITS_OUTPUTS = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_mlp_layernorm", "norm_after")
"""Names by which these other layers are known."""


class TiledRMSNorm(nn.Module):
    """An RMS norm that computes a tile of rows at a time.

    Args:
        norm: The module whose place it takes and whose weight it shares; :func:`fuse_norms` says which norms qualify.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        eps, weight = _eps(norm), norm.get_parameter("weight")
        assert eps is not None
        self.weight, self.eps = weight, eps
        self.training = norm.training

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        if hidden_states.dtype == self.weight.dtype == torch.float32:
            return rms_norm(hidden_states, self.weight, self.eps)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        tiles = _tiles(rows)
        is_other = hidden_states.dtype != self.weight.dtype or not is_cpu(hidden_states)
        if len(tiles) == 1 or is_other or torch.is_grad_enabled():
            return plain_rms_norm(hidden_states, self.weight, self.eps)
        # The inference copy in bfloat16 computes as transformers does, a tile at a time.
        output = torch.empty_like(rows)
        for tile in tiles:
            output[tile] = plain_rms_norm(rows[tile], self.weight, self.eps)
        return output.view(hidden_states.shape)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def fuse_norms(model: nn.Module) -> int:
    """Replace the layers' RMS norms by :class:`TiledRMSNorm`; return how many were replaced.

    Norms that compute something else (Gemma's weights count from 1) stay as they are, and so do those with hooks or a
    forward of their own. Norms whose results others read besides projections stay too, as in layers of experts: their
    routers may compute in float32 and their sums take their dtype from the norm's result, so that rounding it would
    change more than autocast does.

    Args:
        model: A language model on the CPU.
    """
    count = 0
    for layer in list(model.modules()):
        if any(hasattr(layer, name) for name in _NORMS_ITS_OUTPUTS) or not hasattr(layer, _READ_BY_PROJECTIONS[0]):
            continue
        if not only_projects(layer):
            continue
        for name in _READ_BY_PROJECTIONS:
            norm = getattr(layer, name, None)
            if not isinstance(norm, nn.Module) or isinstance(norm, TiledRMSNorm):
                continue
            if is_untouched(norm) and _is_plain(norm):
                setattr(layer, name, TiledRMSNorm(norm))
                count += 1
    return count


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: The rows [..., H] in float32, on the CPU.
        weight: The weight [H] in float32.
        eps: The number that is added to the mean square.

    Returns:
        The result [..., H], in autocast's dtype where it is on, else in float32. Inside, all is float32.
    """
    autocasts = torch.is_autocast_enabled("cpu")
    return _RMSNorm.apply(x, weight, eps, torch.get_autocast_dtype("cpu") if autocasts else x.dtype)  # pyright: ignore[reportReturnType]


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in operations of torch, rounded as transformers' norms are: [..., H] to [..., H]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.new_empty(rows.shape[0], 1)
        # A view, which could not be changed in place, must not be returned.
        output = torch.empty(x.shape, dtype=dtype)
        output_rows = output.view(rows.shape)
        for tile in _tiles(rows):
            torch.linalg.vector_norm(rows[tile], dim=-1, keepdim=True, out=scale[tile])
            scale[tile].square_().div_(rows.shape[1]).add_(eps).rsqrt_()
            output_rows[tile] = torch.mul(rows[tile], scale[tile]).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        ctx.dtype, ctx.recomputed = dtype, None
        return output

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        """The output, computed once for all projections that read it."""
        if ctx.recomputed is None:
            x, weight, scale = ctx.saved_tensors
            rows = x.reshape(-1, x.shape[-1])
            ctx.recomputed = torch.empty(x.shape, dtype=ctx.dtype)
            output_rows = ctx.recomputed.view(rows.shape)
            for tile in _tiles(rows):
                output_rows[tile] = torch.mul(rows[tile], scale[tile]).mul_(weight)
        return ctx.recomputed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        ctx.recomputed = None
        rows = x.reshape(-1, x.shape[-1])
        given = grad_output.reshape(rows.shape)
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        mean_weight = weight / rows.shape[1]
        for tile in _tiles(rows):
            # With n = x * scale and g the gradient of weight * n: dx = scale * (w * g - n * mean(w * g * n)).
            normalised = torch.mul(rows[tile], scale[tile])
            grad = grad_rows[tile].copy_(given[tile])
            product = torch.mul(grad, normalised)
            if grad_weight is not None:
                grad_weight += product.sum(0)
            mean = torch.mv(product, mean_weight)
            grad.mul_(weight).addcmul_(normalised, mean[:, None], value=-1).mul_(scale[tile])
        return grad_rows.view(x.shape), grad_weight, None, None


def _tiles(rows: Tensor) -> list[slice]:
    size = torch.get_num_threads() * max(1, TILE_NUMBERS // rows.shape[1])
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]


def _eps(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def _is_plain(norm: nn.Module) -> bool:
    """Whether the module has one weight, computes with it what :func:`rms_norm` does, and rounds as
    :func:`plain_rms_norm` does."""
    eps, weight = _eps(norm), getattr(norm, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or len(list(norm.parameters())) != 1:
        return False
    if weight.dim() != 1 or weight.dtype != torch.float32:
        return False
    with torch.autocast("cpu", enabled=False):
        x = torch.linspace(-2.0, 3.0, weight.numel())
        # The second row is so small that eps counts.
        x = torch.stack([x, x * eps**0.5])
        is_same = torch.allclose(norm(x), rms_norm(x, weight, eps), rtol=1e-4, atol=1e-6)
        half = x.bfloat16()
        return is_same and torch.equal(
            copy.deepcopy(norm).bfloat16()(half), plain_rms_norm(half, weight.bfloat16(), eps)
        )
