"""What the tests of the losses share: the dense head, and instruments that watch every tensor operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vpd.losses import Head


class OperationWatch(TorchDispatchMode):
    """Records the elements of the largest result and the number of matrix-matrix products."""

    largest_result = 0
    matmuls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.matmuls += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, Tensor):
                self.largest_result = max(self.largest_result, result.numel())
        return results


@pytest.fixture
def operation_watch() -> OperationWatch:
    return OperationWatch()


@pytest.fixture
def dense_logits() -> Callable[[Tensor, Head, float], Tensor]:
    """All logits at once in float64, [T, V], by plain differentiable operations."""

    def logits(hidden: Tensor, head: Head, temperature: float) -> Tensor:
        raw = hidden.double() @ head.weight.double().T
        if head.bias is not None:
            raw = raw + head.bias.double()
        raw = raw * head.scale
        if head.softcap is not None:
            raw = head.softcap * torch.tanh(raw / head.softcap)
        return raw / temperature

    return logits
