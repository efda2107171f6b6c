"""Training passes that save less for their backward pass: they recompute what is cheaper to recompute than to hold.

More than a quarter of what autograd saves of a layer whose norms and MLP are fused can be recomputed by a few passes
over memory from tensors that are saved anyway: the norms' outputs from their inputs, and the MLP's inside from gate and
up. A weight that autocast has cast to bfloat16 is cast again, which saves a copy of the whole network beside it;
autocast must keep no copies either then (``cache_enabled=False``). The results are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vpd.device import is_cpu

Unpack = Callable[[], Tensor]


def recompute() -> AbstractContextManager[Any]:
    """Within it, tensors on the CPU are saved as this module describes; the pass is differentiable once.

    A :class:`torch.autograd.Function` has its output recomputed by having ``recompute``, a static method that takes the
    function's context and returns the output as it was.
    """
    return saved_tensors_hooks(_pack, lambda unpack: unpack())


def _pack(tensor: Tensor) -> Unpack:
    whole = tensor if tensor._base is None else tensor._base
    recomputed = _recomputation(whole) if is_cpu(tensor) and whole.is_contiguous() else None
    if recomputed is None:
        return _unchanged(tensor)
    size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
    return lambda: recomputed().as_strided(size, stride, offset)


def _recomputation(tensor: Tensor) -> Unpack | None:
    node = tensor.grad_fn
    if node is None:
        return None
    if hasattr(getattr(node, "_forward_cls", None), "recompute"):
        return lambda: node._forward_cls.recompute(node)  # pyright: ignore[reportAttributeAccessIssue]
    if node.name() == "ToCopyBackward0":
        # A leaf is a parameter, which is held anyway. Nobody holds the source of another cast.
        weight = getattr(node.next_functions[0][0], "variable", None)
        if weight is not None and weight.device == tensor.device and weight.is_contiguous():
            read, dtype = _unchanged(weight), tensor.dtype
            return lambda: read().to(dtype)
    return None


def _unchanged(tensor: Tensor) -> Unpack:
    # The tensor itself may be saved by its own node, and would keep it alive.
    kept, version = tensor.detach(), tensor._version

    def unpack() -> Tensor:
        if kept._version != version:
            raise RuntimeError("A tensor that the backward pass needs has been changed in place.")
        return kept

    return unpack
