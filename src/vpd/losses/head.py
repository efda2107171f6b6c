"""The map from hidden states to logits, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vpd.device import has_amx, is_cpu, multiplies_bfloat16, rounding_factors

DEFAULT_CHUNK_SIZE = 256
"""How many tokens' logits exist at a time.

With a vocabulary of 49k words these are 50 MB in fp32, with 152k words 160 MB, and a loss holds a few such tensors.
Each chunk also goes once over the head's weight and its gradient, so that small chunks cost time: on a CPU with 49k
words, 32 takes twice as long as 256, and 512 gains a tenth.
"""

TILE_NUMBERS = 2**17
"""How many logits a CPU core works on at a time once their product is made: 512 KB, or one row.

What goes over them several times then finds them in the core's cache; ``benchmarks/losses.py`` shows what that saves.
"""

WORDS_AT_A_TIME = 4096
"""How many words' share of the gradients is rounded at a time, so that it stays in the cache."""


@dataclass(frozen=True, eq=False)
class Head:
    """A language model's output head: logits = (h W^T + b) * scale, then softcap * tanh(logits / softcap).

    Scale and softcap are part of the distribution: Cohere and Granite scale their logits, Gemma caps them. A loss on
    ``h W^T`` alone would train another model than the one that samples.

    Attributes:
        weight: The output matrix [V, H], in any float dtype.
        bias: The bias [V]; None where the model has none.
        scale: The factor on the logits, before the cap.
        softcap: The bound of the logits' absolute value; None for no bound.

    Raises:
        ValueError: Shapes do not fit together, or softcap is not positive.
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
        """The logits of one chunk in fp32, divided by ``temperature``; [T, H] -> [T, V].

        Autocast does not reach inside. ``products`` are those of this head; by default they are exact.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            if products is None:
                products = HeadProducts(self.weight.float(), rounded=False)
            # Scaling [T, H] and [V] saves passes over [T, V].
            gain = self.scale / (temperature if self.softcap is None else self.softcap)
            logits = products.logits(hidden.float() if gain == 1.0 else hidden.float() * gain)
            if self.bias is not None:
                logits.add_(self.bias.float() * gain)
            if self.softcap is None:
                return logits
            return logits.tanh_() * (self.softcap / temperature)


class HeadGradient:
    """Sums up, chunk by chunk, the gradient of a scalar with respect to hidden states, head weight and head bias.

    It computes only the gradients that are wanted: under LoRA the head is frozen, which saves a third of the matmuls.

    Args:
        head: The head in fp32.
        products: The products of the head's weight.
        hidden: The hidden states [T, H] in any float dtype; only their shape and device are read.
        needs: Which gradients are wanted: that of the hidden states, of the weight, of the bias.
        temperature: The temperature that the logits were divided by.

    Attributes:
        hidden: The gradient of the hidden states [T, H] in fp32; None if it is not wanted.
        weight: The gradient of the weight [V, H] in fp32; None if it is not wanted.
        bias: The gradient of the bias [V] in fp32; None if it is not wanted.
    """

    def __init__(
        self, head: Head, products: HeadProducts, hidden: Tensor, needs: tuple[bool, bool, bool], temperature: float
    ) -> None:
        self._head = head
        self._products = products
        self._temperature = temperature
        self._is_empty = True
        self.hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs[0] else None
        # The first chunk's part is written there, not added, so that nothing has to be zeroed.
        make = torch.empty_like if len(hidden) else torch.zeros_like
        self.weight = make(head.weight) if needs[1] else None
        self.bias = torch.zeros_like(head.bias) if needs[2] and head.bias is not None else None

    def add_chunk(
        self, rows: slice, hidden: Tensor, logits: Tensor | None, grad_logits: Tensor, row_weights: Tensor
    ) -> None:
        """Add one chunk's part; ``grad_logits`` is overwritten.

        Args:
            rows: The chunk's place among the T tokens.
            hidden: The chunk's hidden states [chunk, H] in fp32.
            logits: The logits [chunk, V] as :meth:`Head.logits` gave them; read only where the head has a softcap.
            grad_logits: The gradient [chunk, V] with respect to ``logits``, before ``row_weights``.
            row_weights: The factors [chunk] on the rows of ``grad_logits``. They are applied on the H side, where that
                is cheap.
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
    """The consecutive slices of at most ``chunk_size`` that cover ``length``."""
    return (slice(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size))


def tiles(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of a chunk of logits [chunk, V]: on a CPU small enough for the cores' caches, else one."""
    rows = max(1, logits.shape[0])
    if is_cpu(logits):
        rows = torch.get_num_threads() * max(1, TILE_NUMBERS // logits.shape[1])
    return chunks(logits.shape[0], rows)


def may_round_products(device: torch.device) -> bool:
    """Whether autocast is on in bfloat16, so that the head's products may round their factors as all others do."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16


class HeadProducts:
    """The three products of a head's weight and its chunks: logits, and the gradients of hidden states and weight.

    They are exact in fp32. Where they are ``rounded``, their factors may be rounded to bfloat16 on a CPU and to TF32 on
    CUDA, as autocast rounds those of all other products of a network. Sums stay in fp32, and so do the logits: autocast
    would round these to 8 bits, which is to a sixteenth where they are around 20.

    CUDA and CPUs with AMX have such products of fp32 tensors. On other CPUs that multiply bfloat16 the logits are
    exact. There the gradients are rounded, the share of one chunk and of some words at a time, as autocast rounds the
    gradients of all other weights.

    Args:
        weight: The head's weight [V, H] in fp32.
        rounded: Whether the factors may be rounded. It has no effect on devices without such products.
    """

    def __init__(self, weight: Tensor, *, rounded: bool) -> None:
        self._weight = weight
        self._rounded = rounded
        self._by_hand = rounded and is_cpu(weight) and multiplies_bfloat16() and not has_amx()

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
        """Add the gradient to ``total`` [V, H]; the first one is written there instead. ``grad_logits`` is [T, V] and
        ``hidden`` [T, H]; all are fp32."""
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
        """Whether the product is one of the smallest by oneDNN's own measure: they gain nothing and stay exact."""
        return rows.shape[0] * self._weight.numel() <= 16**3

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Round factors where that is wanted. Autocast would round results too, so it does not reach inside."""
        device = self._weight.device
        rounding = rounding_factors(device) if self._rounded else nullcontext()
        with torch.autocast(device.type, enabled=False), rounding:
            yield


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
