"""What the tests of the losses share: the dense head, and instruments that watch every tensor operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from vpd.losses import Head


class OperationWatch(TorchDispatchMode):
    """Records the elements of the largest result, how many results of that size were there at once, and the number of
    matrix-matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_result = self.matmuls = 0
        self._results: list[tuple[int, StorageWeakRef]] = []
        self._most: Counter[int] = Counter()

    @property
    def most_of_the_largest(self) -> int:
        return self._most[self.largest_result]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.matmuls += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, Tensor):
                self._note(result)
        return results

    def _note(self, result: Tensor) -> None:
        size = result.numel()
        self.largest_result = max(self.largest_result, size)
        self._results = [(held, storage) for held, storage in self._results if not storage.expired()]
        if all(storage.cdata != result.untyped_storage()._cdata for _, storage in self._results):
            self._results.append((size, StorageWeakRef(result.untyped_storage())))
        self._most[size] = max(self._most[size], sum(held == size for held, _ in self._results))


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
