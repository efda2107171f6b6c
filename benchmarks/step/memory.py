"""Functions that measure a side's process and network: resident memory by the kernel's counters (Linux), versions."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from torch import nn

from benchmarks.step.specs import SideInfo


def resident_bytes() -> int:
    """Return the resident memory now, in bytes."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the largest resident memory since :func:`reset_peak`, in bytes."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Reset the peak of resident memory (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def static_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights, and of the trained ones' gradients and two AdamW moments in the same dtype."""
    return sum(
        parameter.numel() * parameter.element_size() * (4 if parameter.requires_grad else 1)
        for parameter in model.parameters()
    )


def side_info(idle_bytes: int, model: nn.Module) -> SideInfo:
    """Describe a side once its network is there."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    names = ("vpd-rl", "trl", "torch", "transformers", "accelerate")
    return SideInfo(idle_bytes, static_bytes(model), parameters, {name: version(name) for name in names})


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this benchmark needs Linux.")
