"""Rotary positions that go over queries and keys once, and hand attention what autocast would make of them anyway.

Under autocast transformers' function casts queries and keys from bfloat16 to float32 and makes five tensors of their
size there, and attention casts the sum back. Here a tile of tokens stays in the CPU's cache from the first operation to
the last cast. The backward pass needs only the cosines and sines.

transformers has no plain way to replace the function ``apply_rotary_pos_emb``, which its attention layers call by name:
``use_kernelized_func`` needs the package ``kernels``, and a new function in the layers' module would change all models
of the process. So each layer's own forward is rebuilt with another function under that name.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vpd.device import is_cpu
from vpd.policy.cpu.norms import TILE_NUMBERS

_NAME = "apply_rotary_pos_emb"
"""The function of their module that transformers' attention layers call."""

Rotation: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
"""A function of queries, keys, cosines and sines that returns the rotated queries and keys."""


def fuse_rotary(model: nn.Module) -> int:
    """Let the attention layers rotate as this module describes, for good; return how many do.

    Layers whose function computes something else (with pairs of neighbours instead of halves) stay as they are, and so
    do those that call it otherwise, or have a forward of their own or a decorated one. The changed layers do not see
    later changes of their module's functions.

    Args:
        model: A language model on the CPU.
    """
    count = 0
    for layer in model.modules():
        function = type(layer).forward
        is_own = "forward" not in vars(layer) and isinstance(function, FunctionType)
        if not is_own or hasattr(function, "__wrapped__") or _NAME not in function.__code__.co_names:
            continue
        theirs = function.__globals__.get(_NAME)
        if theirs is None or not _is_plain(theirs):
            continue
        # The forward is set on the instance, so that other models keep their class and its module as they are.
        names = {**function.__globals__, _NAME: _faster(theirs)}
        own = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
        own.__kwdefaults__ = function.__kwdefaults__
        layer.forward = MethodType(own, layer)
        count += 1
    return count


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (-x2, x1) * sin, where x1 and x2 are the halves of the last dimension; computed in float32.

    Args:
        x: The queries or keys [B, heads, T, D] in float32 or bfloat16, on the CPU.
        cos: The cosines [B or 1, T, D] in float32.
        sin: The sines, likewise.

    Returns:
        The rotated queries or keys [B, heads, T, D], in autocast's dtype where it is on, else in float32.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    return _Rotation.apply(x, cos, sin, dtype)  # pyright: ignore[reportReturnType]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotate(x, cos, sin, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_output, cos, -sin.roll(sin.shape[-1] // 2, dims=-1), ctx.dtype), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    batch, heads, length, width = x.shape
    half = width // 2
    tokens = x.transpose(1, 2).reshape(-1, heads, width)
    cos, sin = (part.expand(batch, length, width).reshape(-1, 1, width) for part in (cos, sin))
    # It is laid out as attention's outputs are, and is no view, which could not be changed in place.
    strides = (length * heads * width, width, heads * width, 1)
    output = torch.empty_strided((batch, heads, length, width), strides, dtype=dtype)
    output_tokens = output.transpose(1, 2).view(tokens.shape)
    size = torch.get_num_threads() * max(1, TILE_NUMBERS // (heads * width))
    for start in range(0, len(tokens), size):
        tile = slice(start, start + size)
        given = tokens[tile].float()
        rotated = torch.mul(given, cos[tile])
        rotated[..., :half].addcmul_(given[..., half:], sin[tile, :, :half], value=-1)
        rotated[..., half:].addcmul_(given[..., :half], sin[tile, :, half:])
        output_tokens[tile] = rotated
    return output


def _faster(theirs: Rotation) -> Rotation:
    """A function that calls :func:`rotate` where that computes the same, and else transformers' function."""

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **others: Any
    ) -> tuple[Tensor, Tensor]:
        is_float32 = cos.dtype == sin.dtype == torch.float32 and is_cpu(q)
        # Some functions return the dtype that they were given; without autocast only float32 is the same in all.
        is_float32 &= torch.is_autocast_enabled("cpu") or q.dtype == k.dtype == torch.float32
        is_whole = q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] == k.shape[-1]
        if rest or others or not is_float32 or not is_whole or cos.requires_grad or sin.requires_grad:
            return theirs(q, k, cos, sin, *rest, **others)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return apply_rotary_pos_emb


def _is_plain(function: Rotation) -> bool:
    """Whether the function computes what :func:`rotate` does."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 3, 8, generator=generator), torch.randn(1, 2, 3, 8, generator=generator)
    cos, sin = torch.randn(2, 1, 3, 8, generator=generator)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = rotate(query, cos, sin), rotate(key, cos, sin)
        try:
            found = function(query, key, cos, sin)
            return all(torch.allclose(*pair, atol=1e-6) for pair in zip(found, expected, strict=True))
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError):
            return False
