"""What the processor computes natively."""

from __future__ import annotations

import torch


def multiplies_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are faster than in float32: by instructions of the processor's own, which
    oneDNN, where it is missing or turned off, would not use, and where it must emulate them has no gain from."""
    has_library = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    capabilities = torch.cpu.get_capabilities()
    return has_library and bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
