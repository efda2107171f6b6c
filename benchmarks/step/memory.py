"""What a side's process and network take: resident memory from the kernel's own counters (Linux), and versions."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from torch import nn

from benchmarks.step.specs import SideInfo


def resident_bytes() -> int:
    """Resident memory now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Largest resident memory since :func:`reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Begin anew with the peak (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def static_bytes(model: nn.Module) -> int:
    """Weights, and gradients and AdamW's two moments of those that are trained, in the weights' dtype."""
    return sum(
        parameter.numel() * parameter.element_size() * (4 if parameter.requires_grad else 1)
        for parameter in model.parameters()
    )


def side_info(idle_bytes: int, model: nn.Module) -> SideInfo:
    """What a side says of itself once its network is there."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    names = ("vpd-rl", "trl", "torch", "transformers", "accelerate")
    return SideInfo(idle_bytes, static_bytes(model), parameters, {name: version(name) for name in names})


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this benchmark needs Linux.")
