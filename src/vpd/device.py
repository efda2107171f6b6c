"""What the machine offers and what a run takes of it: device, dtypes, kernels, cores and memory.

This is the only module that asks for them. The rest of the package asks these functions, so that a new kind of device
is described in one place.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vpd.config import ConfigError, ModelSettings

PackedKernel: TypeAlias = Literal["blocks", "flex"]
"""How attention over a packed batch is computed: see :mod:`vpd.packing.kernels`."""


def training_device() -> torch.device:
    """The device that this process trains on: the first GPU that CUDA offers, else the CPU.

    ``ACCELERATE_USE_CPU`` keeps accelerate off the GPUs, and so everything here.
    """
    return torch.device("cuda" if torch.cuda.is_available() and not _stays_on_cpu() else "cpu")


def _stays_on_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on")


def is_cpu(where: torch.device | Tensor) -> bool:
    """Whether this is the CPU, or a tensor in its memory."""
    return _device_of(where).type == "cpu"


def is_cuda(where: torch.device | Tensor) -> bool:
    """Whether this is a GPU that CUDA drives, or a tensor in its memory."""
    return _device_of(where).type == "cuda"


def _device_of(where: torch.device | Tensor) -> torch.device:
    return where.device if isinstance(where, Tensor) else where


def gpu_count() -> int:
    """How many GPUs CUDA offers to this process; they are not initialised, so that a child process may use them."""
    return torch.cuda.device_count()


def gpu_names() -> list[str]:
    """The name of each GPU that CUDA offers to this process, which initialises them."""
    return [torch.cuda.get_device_name(index) for index in range(gpu_count())]


def usable_cores() -> int:
    """How many CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes(device: torch.device) -> int | None:
    """How much memory the device has, in bytes; None where the system does not tell."""
    if is_cuda(device):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def peak_memory_bytes() -> int:
    """The peak memory of this process so far: allocated on the GPU where it trains on one, else resident in main
    memory."""
    if is_cuda(training_device()):
        return torch.cuda.max_memory_allocated()
    import resource  # Only Unix has it, and only this function needs it.

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given; a CPU has done it before it returns."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices faster than float32 ones.

    It does so by instructions of its own that oneDNN uses. Where they are missing oneDNN emulates them, which gains
    nothing, and without oneDNN they are not used.
    """
    has_library = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    return has_library and (has_amx() or bool(torch.cpu.get_capabilities().get("avx512_bf16")))


def has_amx() -> bool:
    """Whether the CPU has AMX, with which oneDNN can round the factors of float32 products to bfloat16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def rearranges_weights() -> bool:
    """Whether oneDNN can keep the bfloat16 weights of linear layers in the order in which the CPU reads them."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively, so that they are faster than float32."""
    if is_cuda(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_cpu(device) and multiplies_bfloat16()


def autocasts(settings: ModelSettings, device: torch.device) -> bool:
    """Whether training passes multiply matrices in bfloat16 while the weights are float32."""
    wanted = settings.autocast == "bfloat16" or (settings.autocast == "auto" and computes_bfloat16(device))
    return wanted and settings.dtype == "float32"


def optimises_layers(settings: ModelSettings) -> bool:
    """Whether :mod:`vpd.policy.cpu` changes how the layers compute and what training passes keep.

    It does nothing where there is an accelerator of any kind: the network will go there, and there are other kernels
    for its layers (such as Liger's).
    """
    return settings.fused_layers and (_stays_on_cpu() or not torch.accelerator.is_available())


def default_kernel(device: torch.device) -> PackedKernel:
    """The attention kernel for packed batches that is fastest on the device.

    On CUDA one compiled kernel saves the launches of many small ones. Elsewhere ``flex_attention`` has no backward
    pass.
    """
    return "flex" if is_cuda(device) else "blocks"


def packed_kernel(settings: ModelSettings, device: torch.device) -> PackedKernel:
    """The attention kernel that the settings choose for training on the device.

    Raises:
        ConfigError: ``flex`` cannot train on the device.
    """
    if settings.packed_attention == "auto":
        return default_kernel(device)
    if settings.packed_attention == "flex" and not is_cuda(device):
        raise ConfigError(
            'model.packed_attention = "flex" has a backward pass on CUDA only, and there is no such GPU here: take '
            '"blocks" or "auto".'
        )
    return settings.packed_attention


@contextmanager
def rounding_factors(device: torch.device) -> Iterator[None]:
    """Within it, products of float32 tensors may round their factors, which is faster; sums and results stay float32.

    On CUDA factors are rounded to TF32. On a CPU oneDNN makes the products. With AMX it rounds the factors to bfloat16.
    On other CPUs with AVX-512 it rounds nothing, and is still two to three times as fast, on an AMD, as the library
    that PyTorch takes by default. The smallest products gain nothing and stay exact, as do those on other devices.

    This is meant for single products by one thread. PyTorch has one switch for the whole process: products that other
    threads make meanwhile are rounded too, and when two threads use it at the same time it may stay on.
    """
    if is_cuda(device):
        backend, precision = torch.backends.cuda.matmul, "tf32"
    elif is_cpu(device):
        backend, precision = torch.backends.mkldnn.matmul, "bf16"  # pyright: ignore[reportAttributeAccessIssue]
    else:
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before
