"""Writes the state of a run's parts as JSON and safetensors, which hold values and can hold no code.

A state is a tree of dicts, lists and tuples around numbers, texts and tensors. ``NAME.json`` holds the tree, in which a
tensor stands as its key in ``NAME.safetensors``. That file is there only where the tree has tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vpd.runs.files import RunError


def write_state(folder: Path, name: str, state: Any) -> None:
    """Write a state into new files of ``folder``.

    Raises:
        RunError: The state holds an object that is neither a number nor a text, a tensor, or a dict, list or tuple.
    """
    tensors = _Tensors()
    tree = encode_state(name, state, tensors.add)
    (folder / f"{name}.json").write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")
    if tensors.by_key:
        save_file(tensors.by_key, folder / f"{name}.safetensors")


def read_state(folder: Path, name: str) -> Any:
    """Read what :func:`write_state` wrote, with all tensors on the CPU.

    Raises:
        RunError: The files are not what :func:`write_state` writes.
    """
    path, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return _decoded(tree, load_file(weights) if weights.exists() else {})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, SafetensorError) as error:
        raise RunError(
            f"{path} does not hold the state of a part of a run: {type(error).__name__}: {error}."
        ) from error


def encode_state(name: str, state: Any, add_tensor: Callable[[torch.Tensor], str]) -> Any:
    """Turn a state into what JSON can hold, and give each tensor to ``add_tensor``, which returns its key.

    Raises:
        RunError: The state holds an object of another kind; ``name`` tells whose state it is.
    """

    def encoded(value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        if isinstance(value, torch.Tensor):
            return {"tensor": add_tensor(value)} | _layout(value)
        if isinstance(value, Mapping):
            return {"dict": [[encoded(key), encoded(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [encoded(item) for item in value]}
        if isinstance(value, list):
            return [encoded(item) for item in value]
        raise RunError(
            f"The state of the {name} holds a {type(value).__name__}, which a checkpoint does not keep: let its "
            "state_dict return numbers, texts and tensors in dicts, lists and tuples."
        )

    return encoded(state)


class _Tensors:
    """Collects the tensors of a tree; one that occurs several times, such as a tied weight, is kept once."""

    def __init__(self) -> None:
        self.by_key: dict[str, torch.Tensor] = {}
        self._keys: dict[Any, str] = {}
        self._storages: set[tuple[torch.device, int]] = set()

    def add(self, tensor: torch.Tensor) -> str:
        tensor = tensor.detach()
        same = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if same not in self._keys:
            storage = (tensor.device, tensor.untyped_storage().data_ptr())
            # safetensors refuses tensors that share memory.
            stored = tensor.clone(memory_format=torch.contiguous_format) if storage in self._storages else tensor
            self._storages.add(storage)
            self._keys[same] = key = str(len(self.by_key))
            self.by_key[key] = stored.contiguous()
        return self._keys[same]


def _layout(tensor: torch.Tensor) -> dict[str, Any]:
    """Name the strides of a tensor whose elements lie in another order than the file's; an optimizer may rely on it."""
    is_dense = torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    return {} if tensor.is_contiguous() or not is_dense else {"stride": list(tensor.stride())}


def _decoded(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decoded(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        stored = tensors[tree["tensor"]]
        # A copy, since the stored one is a view of the file.
        return torch.empty_strided(stored.shape, tree.get("stride", stored.stride()), dtype=stored.dtype).copy_(stored)
    if "tuple" in tree:
        return tuple(_decoded(item, tensors) for item in tree["tuple"])
    if "float" in tree:
        return float(tree["float"])
    return {_decoded(key, tensors): _decoded(value, tensors) for key, value in tree["dict"]}
