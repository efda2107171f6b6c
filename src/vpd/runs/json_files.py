"""Reads and writes the JSON of a run's folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vpd.runs.files import RunError, atomic_write_text
from vpd.runs.manifest import checksum_of


def read_json(path: Path) -> dict[str, Any] | None:
    """Read the object in a JSON file; None where there is no file.

    Raises:
        RunError: The file holds something else.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise RunError(f"{path} should hold a JSON object, not a {type(values).__name__}.")
    return values


def write_checked_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object with a checksum of itself, by which :func:`is_as_written` sees damage."""
    atomic_write_text(path, as_json({**values, _CHECKSUM: _checksum(values)}, indent=2) + "\n")


def is_as_written(values: Mapping[str, Any]) -> bool:
    """Tell whether an object that :func:`write_checked_json` wrote is still what it was."""
    return values.get(_CHECKSUM) == _checksum({name: value for name, value in values.items() if name != _CHECKSUM})


_CHECKSUM = "checksum"


def _checksum(values: Mapping[str, Any]) -> str:
    return checksum_of(as_json(values).encode())


def as_json(values: Any, indent: int | None = None) -> str:
    """Write a value as JSON, with null in place of numbers that are not finite."""
    return json.dumps(plain(values), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
    """Turn a value into one that JSON can hold: no array types, and no NaN or infinity, which other parsers refuse."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0:
        return plain(value.item())
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no place in a run's JSON files: {value!r}")
