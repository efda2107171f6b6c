"""Applies ``section.key=value`` overrides, and reads paths in a TOML file relative to that file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vpd.config.section import ConfigError

_OUTPUT = "run.output_dir"
_INPUTS = ("model.name", "data.path", "data.final_path", "algorithm.teacher_model.name")
"""The settings that are a path, or the name of something that is found elsewhere, such as a hub id."""

_SUFFIXES = frozenset({".jsonl", ".json", ".parquet", ".csv", ".gguf"})


def apply_override(values: dict[str, Any], override: str) -> None:
    """Change nested settings as ``section.key=value`` or ``section={...}`` says. A value is TOML or a bare word.

    Raises:
        ConfigError: The override has another form, or names something inside a value.
    """
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if not equals or not name or not (sections or isinstance(value, dict)):
        raise ConfigError(f"--set takes section.key=value, or section={{...}} in place of all of it, got {override!r}.")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section.")
    values[name] = value


def anchor_paths(values: dict[str, Any], file: Path) -> None:
    """Make the paths in nested settings that were read from ``file`` absolute.

    Raises:
        ConfigError: A path exists in the working directory and not beside the file.
    """
    for name in (_OUTPUT, *_INPUTS):
        *sections, key = name.split(".")
        section: Any = values
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = _anchored(name, section[key], file)


def anchored_overrides(overrides: Sequence[str], file: Path) -> list[str]:
    """Follow each override that stands in ``file`` and names a path by one that has the absolute path."""
    result = []
    for override in overrides:
        values: dict[str, Any] = {}
        apply_override(values, override)
        given = _paths_in(values)
        anchor_paths(values, file)
        changed = [(name, path) for name, path in _paths_in(values).items() if path != given[name]]
        result += [override, *(f"{name}={quoted(path)}" for name, path in changed)]
    return result


def anchored_path(path: str, file: Path) -> str:
    """Return as an absolute path what ``file`` says relative to itself."""
    return os.path.normpath(file.resolve().parent / Path(path).expanduser())


def quoted(path: str | Path) -> str:
    """Write the path as a TOML string."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _paths_in(values: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in (_OUTPUT, *_INPUTS):
        value: Any = values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str):
            found[name] = value
    return found


def _anchored(name: str, value: str, file: Path) -> str:
    path = anchored_path(value, file)
    if name == _OUTPUT or os.path.exists(path):
        return path
    if value and os.path.exists(value):
        written = os.path.relpath(value, file.resolve().parent)
        raise ConfigError(
            f"{name} = {value!r} in {file} is relative to that file, and there is no {path}. There is one in the "
            f"working directory: write {written!r} in the file, or give it on the command line by --set."
        )
    is_file = value.startswith((".", "/", "~")) or Path(value).suffix in _SUFFIXES
    return path if is_file else value
