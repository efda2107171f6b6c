"""What the processor computes natively."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def multiplies_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are faster than in float32: by instructions of the processor's own, which
    oneDNN, where it is missing or turned off, would not use, and where it must emulate them has no gain from."""
    has_library = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    capabilities = torch.cpu.get_capabilities()
    return has_library and bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextmanager
def rounding_factors(device: torch.device) -> Iterator[None]:
    """Within, products of float32 tensors may round their factors, and are faster; their sums and results stay float32.

    On CUDA factors are rounded to TF32. On a processor oneDNN multiplies: where there is AMX it rounds them to
    bfloat16, on others with AVX-512 it rounds nothing, and is still faster than the library that PyTorch takes by
    default, on an AMD two to three times. The smallest products, which gain nothing, stay exact, and those on other
    devices.

    For single products, by one thread: PyTorch has one switch for the whole process, what other threads multiply
    meanwhile is rounded too, and of two that turn it at the same time one may leave it on.
    """
    if device.type not in ("cuda", "cpu"):
        yield
        return
    backend, precision = (
        (torch.backends.cuda.matmul, "tf32") if device.type == "cuda" else (torch.backends.mkldnn.matmul, "bf16")  # pyright: ignore[reportAttributeAccessIssue]
    )
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before
