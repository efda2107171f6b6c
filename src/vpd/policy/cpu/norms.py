"""RMS norms that go over their rows once, and hand the products behind them what autocast would make of it anyway.

transformers' norm makes a tensor of its input's size with each of its operations, in float32, and under autocast each
of the projections behind it casts the result to bfloat16 for itself. Here a tile of rows stays in the processor's cache
from the first operation to the last, the result is cast once, and the backward pass needs the input and one number a
row. The projections' gradients are then added up in bfloat16, where they were cast first. On a processor without
native bfloat16 only the passes over memory are saved.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE_NUMBERS = 2**17
"""Per core: half a megabyte in float32."""

_READ_BY_PROJECTIONS = ("input_layernorm", "post_attention_layernorm")
"""In layers that normalise what attention and MLP read; others add the norm's result to the residual stream."""

_NORMS_ITS_OUTPUTS = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_mlp_layernorm", "norm_after")


def fuse_norms(model: nn.Module) -> int:
    """Let the layers' RMS norms compute as this module describes, for good; return how many do.

    Where there is a GPU, none: the model will go there, and its norms have kernels of others (such as Liger's).
    Norms whose class computes something else (Gemma's weights count from 1) stay as they are, and so do those whose
    result is not read by projections alone, as in layers of experts, whose routers may compute in float32 and whose
    sums take their dtype from it: rounding it would change more than autocast does.

    Args:
        model: a language model on the CPU.
    """
    if torch.accelerator.is_available():
        return 0
    count = 0
    for layer in model.modules():
        if any(hasattr(layer, name) for name in _NORMS_ITS_OUTPUTS) or not hasattr(layer, _READ_BY_PROJECTIONS[0]):
            continue
        if not only_projects(layer):
            continue
        for name in _READ_BY_PROJECTIONS:
            norm = getattr(layer, name, None)
            if isinstance(norm, nn.Module) and _is_plain(norm):
                # On the instance, so that the class stays as it is for other models. A deep copy has it too; pickle
                # looks methods up by name, so that an unpickled norm computes as its class does.
                norm.forward = MethodType(forward, norm)
                count += 1
    return count


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: [..., H] in float32, on the CPU.
        weight: [H] in float32.
        eps: added to the mean square.

    Returns:
        [..., H], in autocast's dtype where it is on, else in float32. Inside, all is float32.
    """
    autocasts = torch.is_autocast_enabled("cpu")
    return _RMSNorm.apply(x, weight, eps, torch.get_autocast_dtype("cpu") if autocasts else x.dtype)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.new_empty(rows.shape[0], 1)
        # Not returned as a view, which could not be changed in place.
        output = torch.empty(x.shape, dtype=dtype)
        output_rows = output.view(rows.shape)
        for tile in _tiles(rows):
            torch.linalg.vector_norm(rows[tile], dim=-1, keepdim=True, out=scale[tile])
            scale[tile].square_().div_(rows.shape[1]).add_(eps).rsqrt_()
            output_rows[tile] = torch.mul(rows[tile], scale[tile]).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        ctx.dtype, ctx.remade = dtype, None
        return output

    @staticmethod
    def remake(ctx: Any) -> Tensor:
        """The output again, once for all projections that read it."""
        if ctx.remade is None:
            x, weight, scale = ctx.saved_tensors
            rows = x.reshape(-1, x.shape[-1])
            ctx.remade = torch.empty(x.shape, dtype=ctx.dtype)
            remade_rows = ctx.remade.view(rows.shape)
            for tile in _tiles(rows):
                remade_rows[tile] = torch.mul(rows[tile], scale[tile]).mul_(weight)
        return ctx.remade

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        ctx.remade = None
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


def forward(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    """The ``forward`` of a fused norm."""
    weight = norm.weight
    if hidden_states.dtype == weight.dtype == torch.float32:
        return rms_norm(hidden_states, weight, _eps(norm))  # pyright: ignore[reportArgumentType]
    compute = type(norm).forward
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    tiles = _tiles(rows)
    is_other = hidden_states.dtype != weight.dtype or hidden_states.device.type != "cpu"
    if len(tiles) == 1 or is_other or torch.is_grad_enabled():
        return compute(norm, hidden_states)
    # Such as a copy in bfloat16 that samples: as transformers has it, a tile at a time.
    output = torch.empty_like(rows)
    for tile in tiles:
        output[tile] = compute(norm, rows[tile])
    return output.view(hidden_states.shape)


def _eps(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def only_projects(layer: nn.Module) -> bool:
    """Whether all matrices of a layer are those of linear modules: experts and their routers often hold bare ones."""
    return all(
        isinstance(module, nn.Linear)
        for module in layer.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 1
    )


def _is_plain(norm: nn.Module) -> bool:
    """Whether the module has one weight, and computes with it what :func:`rms_norm` does."""
    eps, weight = _eps(norm), getattr(norm, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or len(list(norm.parameters())) != 1:
        return False
    if weight.dim() != 1 or weight.dtype != torch.float32:
        return False
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x = torch.linspace(-2.0, 3.0, weight.numel())
        # The second row is so small that eps counts.
        x = torch.stack([x, x * eps**0.5])
        return torch.allclose(norm(x), rms_norm(x, weight, eps), rtol=1e-4, atol=1e-6)
