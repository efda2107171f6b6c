"""Training passes that keep less for their backward pass: what is cheaper to make again than to hold.

Of what autograd keeps of a layer whose norms and MLP are fused, over a quarter is made in a few passes over memory of
what it keeps anyway: the norms' outputs of their inputs, and the MLP's inside of gate and up. And a weight that
autocast has cast to bfloat16 is cast again, in place of a copy of the whole network beside it: so autocast has to keep
no copies either (``cache_enabled=False``). What comes out is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Unpack = Callable[[], Tensor]


def remaking() -> AbstractContextManager[Any]:
    """Within it, what is made on a processor is kept as this module describes; differentiable once.

    A :class:`torch.autograd.Function` has its output made again by having ``remake``, a static method that takes the
    function's context and gives the output as it was.
    """
    return saved_tensors_hooks(_pack, lambda unpack: unpack())


def _pack(tensor: Tensor) -> Unpack:
    whole = tensor if tensor._base is None else tensor._base
    remake = _remake_of(whole) if tensor.device.type == "cpu" and whole.is_contiguous() else None
    if remake is None:
        return _unchanged(tensor)
    size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
    return lambda: remake().as_strided(size, stride, offset)


def _remake_of(tensor: Tensor) -> Unpack | None:
    node = tensor.grad_fn
    if node is None:
        return None
    if hasattr(getattr(node, "_forward_cls", None), "remake"):
        return lambda: node._forward_cls.remake(node)  # pyright: ignore[reportAttributeAccessIssue]
    if node.name() == "ToCopyBackward0":
        # A leaf is a parameter; whatever else is cast nobody holds.
        weight = getattr(node.next_functions[0][0], "variable", None)
        if weight is not None and weight.device == tensor.device and weight.is_contiguous():
            read, dtype = _unchanged(weight), tensor.dtype
            return lambda: read().to(dtype)
    return None


def _unchanged(tensor: Tensor) -> Unpack:
    # Not the tensor itself: its node may be the one that keeps it, and would keep itself alive.
    kept, version = tensor.detach(), tensor._version

    def unpack() -> Tensor:
        if kept._version != version:
            raise RuntimeError("A tensor that the backward pass needs has been changed in place.")
        return kept

    return unpack
