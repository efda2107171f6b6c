"""The map from hidden states to logits, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vpd.device import multiplies_bfloat16, rounding_factors

DEFAULT_CHUNK_SIZE = 256
"""Tokens whose logits exist at a time.

50 MB in fp32 for a vocabulary of 49k, 160 MB for 152k, a few times over. Each chunk also passes once over the head's
weight and its gradient, so that small chunks cost time: on a CPU with 49k words, 32 takes twice as long as 256, and 512
gains a tenth.
"""

TILE_NUMBERS = 2**17
"""Logits that a core works on at a time once their product is made, 512 KB (or one row): on a processor, what goes over
them several times finds them in the core's cache. ``benchmarks/losses.py`` shows what that saves."""

WORDS_AT_A_TIME = 4096
"""Words of the vocabulary whose share of the gradients is rounded at a time, to stay in the cache."""


@dataclass(frozen=True, eq=False)
class Head:
    """A language model's output head: logits = (h W^T + b) * scale, then softcap * tanh(logits / softcap).

    Scale and softcap are part of the distribution: Cohere and Granite scale their logits, Gemma caps them. A loss on
    ``h W^T`` alone would train another model than the one that samples.

    Attributes:
        weight: [V, H], any float dtype.
        bias: [V], or None.
        scale: factor on the logits, before the cap.
        softcap: bound of the logits' absolute value, or None for no bound.

    Raises:
        ValueError: shapes do not fit together, or softcap is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise ValueError(f"The head's weight must be [vocabulary, hidden], got shape {tuple(self.weight.shape)}.")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"The head's bias must have one entry for each of the {self.weight.shape[0]} words of the vocabulary, "
                f"got shape {tuple(self.bias.shape)}."
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, or None for no cap; got {self.softcap}.")

    @property
    def vocabulary_size(self) -> int:
        return self.weight.shape[0]

    def first(self, count: int) -> Head:
        """The head over the first ``count`` tokens of the vocabulary alone; gradients reach the same parameters."""
        if count == self.vocabulary_size:
            return self
        return replace(self, weight=self.weight[:count], bias=None if self.bias is None else self.bias[:count])

    def detached_float32(self) -> Head:
        """The same head as constants in fp32; copies nothing where the weights are fp32 already."""
        bias = None if self.bias is None else self.bias.detach().float()
        return replace(self, weight=self.weight.detach().float(), bias=bias)

    def logits(self, hidden: Tensor, temperature: float = 1.0, *, products: HeadProducts | None = None) -> Tensor:
        """Logits of one chunk in fp32, divided by ``temperature``; [T, H] -> [T, V].

        Autocast does not reach inside; ``products`` are this head's, exact by default.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            if products is None:
                products = HeadProducts(self.weight.float(), rounded=False)
            # The scalars go on [T, H] and [V], which saves passes over [T, V].
            gain = self.scale / (temperature if self.softcap is None else self.softcap)
            logits = products.logits(hidden.float() if gain == 1.0 else hidden.float() * gain)
            if self.bias is not None:
                logits.add_(self.bias.float() * gain)
            if self.softcap is None:
                return logits
            return logits.tanh_() * (self.softcap / temperature)


class HeadGradient:
    """Sums up, chunk by chunk, the gradient of a scalar with respect to hidden states, head weight and head bias.

    Only what is asked for is computed: under LoRA the head is frozen, which saves a third of the matmuls.

    Args:
        head: in fp32.
        products: of its weight.
        hidden: [T, H], any float dtype; only its shape and device are read.
        needs: whether the gradient of (hidden, weight, bias) is wanted.

    Attributes:
        hidden, weight, bias: [T, H], [V, H], [V] in fp32; None where not wanted.
    """

    def __init__(
        self, head: Head, products: HeadProducts, hidden: Tensor, needs: tuple[bool, bool, bool], temperature: float
    ) -> None:
        self._head = head
        self._products = products
        self._temperature = temperature
        self._is_empty = True
        self.hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs[0] else None
        # The first chunk's part is written there, not added.
        make = torch.empty_like if len(hidden) else torch.zeros_like
        self.weight = make(head.weight) if needs[1] else None
        self.bias = torch.zeros_like(head.bias) if needs[2] and head.bias is not None else None

    def add_chunk(
        self, rows: slice, hidden: Tensor, logits: Tensor | None, grad_logits: Tensor, row_weights: Tensor
    ) -> None:
        """Add one chunk's part; ``grad_logits`` is overwritten.

        Args:
            rows: the chunk's place among the T tokens.
            hidden: [chunk, H] in fp32.
            logits: [chunk, V] as :meth:`Head.logits` gave them; read only where the head has a softcap.
            grad_logits: [chunk, V], the gradient with respect to ``logits`` before ``row_weights``.
            row_weights: [chunk], factors on the rows of ``grad_logits``. Applied on the H side, where it is cheap.
        """
        if self._head.softcap is not None and logits is not None:
            # d tanh(u) = (1 - tanh(u)^2) du, with tanh(u) = logits * temperature / softcap.
            tanh = logits * (self._temperature / self._head.softcap)
            grad_logits.addcmul_(grad_logits * tanh, tanh, value=-1.0)
        row_weights = row_weights * (self._head.scale / self._temperature)
        if self.hidden is not None:
            torch.mul(self._products.grad_hidden(grad_logits), row_weights[:, None], out=self.hidden[rows])
        if self.weight is not None:
            weighted = hidden * row_weights[:, None]
            self._products.add_grad_weight(self.weight, grad_logits, weighted, is_first=self._is_empty)
        if self.bias is not None:
            self.bias.addmv_(grad_logits.t(), row_weights)
        self._is_empty = False


def chunks(length: int, chunk_size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``chunk_size`` that cover ``length``."""
    return (slice(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size))


def tiles(logits: Tensor) -> Iterator[slice]:
    """Slices of rows of a chunk of logits [chunk, V], small enough for the cores' caches; one on other devices."""
    rows = max(1, logits.shape[0])
    if logits.device.type == "cpu":
        rows = torch.get_num_threads() * max(1, TILE_NUMBERS // logits.shape[1])
    return chunks(logits.shape[0], rows)


def may_round_products(device: torch.device) -> bool:
    """Whether autocast is on in bfloat16, so that the head's products may round their factors as all others do."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16


class HeadProducts:
    """The three products of a head's weight and its chunks: logits, and the gradients of hidden states and weight.

    Exact in fp32, or, where ``rounded``, with factors that may be rounded to bfloat16 on a processor and to TF32 on
    CUDA, as under autocast all other products of a network are. Sums stay in fp32, and so do the logits, which autocast
    rounds to 8 bits: to a sixteenth where they are around 20.

    CUDA and processors with AMX have such products of fp32 tensors. On other processors that multiply bfloat16 the
    logits are exact, and gradients are rounded, the share of a chunk and of some words at a time, as autocast rounds
    those of all other weights.

    Args:
        weight: [V, H] fp32.
        rounded: see above. Without effect on devices that have no such products.
    """

    def __init__(self, weight: Tensor, *, rounded: bool) -> None:
        self._weight = weight
        self._rounded = rounded
        self._by_hand = rounded and weight.device.type == "cpu" and multiplies_bfloat16() and not _has_amx()

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, H] fp32 -> [T, V] fp32; differentiable where the products are exact."""
        with self._precision():
            return torch.mm(hidden, self._weight.t())

    def grad_hidden(self, grad_logits: Tensor) -> Tensor:
        """[T, V] fp32 -> [T, H]."""
        if not self._by_hand or self._is_small(grad_logits):
            with self._precision():
                return torch.mm(grad_logits, self._weight)
        total = grad_logits.new_zeros(grad_logits.shape[0], self._weight.shape[1])
        for words in chunks(self._weight.shape[0], WORDS_AT_A_TIME):
            total += torch.mm(grad_logits[:, words].bfloat16(), self._weight[words].bfloat16())
        return total

    def add_grad_weight(self, total: Tensor, grad_logits: Tensor, hidden: Tensor, *, is_first: bool = False) -> None:
        """Add the gradient to ``total`` [V, H] fp32, or, where it is the first, write it there; ``grad_logits`` [T, V]
        and ``hidden`` [T, H] are fp32."""
        if not self._by_hand or self._is_small(hidden):
            with self._precision():
                torch.addmm(total, grad_logits.t(), hidden, beta=0.0 if is_first else 1.0, out=total)
            return
        hidden = hidden.bfloat16()
        for words in chunks(self._weight.shape[0], WORDS_AT_A_TIME):
            part = torch.mm(grad_logits[:, words].bfloat16().t(), hidden)
            if is_first:
                total[words] = part
            else:
                total[words] += part.float()

    def _is_small(self, rows: Tensor) -> bool:
        """By oneDNN's own measure; the smallest products gain nothing and stay exact."""
        return rows.shape[0] * self._weight.numel() <= 16**3

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Autocast, which would round results, does not reach inside."""
        device = self._weight.device
        rounding = rounding_factors(device) if self._rounded else nullcontext()
        with torch.autocast(device.type, enabled=False), rounding:
            yield


def _has_amx() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def check_hidden(name: str, hidden: Tensor, head: Head) -> None:
    """Raise ValueError unless ``hidden`` is [T, H] with the head's H."""
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"{name} must be [tokens, {head.weight.shape[1]}] to fit its head, got shape {tuple(hidden.shape)}; "
            "flatten batch and sequence into one dimension first."
        )


def check_settings(temperature: float, chunk_size: int) -> None:
    """Raise ValueError for a temperature or a chunk size that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}.")
