"""Says of each setting its type, its default and what it does, as the schema and its docstrings have it."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vpd.config.algorithm import algorithm_class, algorithm_names
from vpd.config.run import VPDConfig
from vpd.config.section import ConfigError, did_you_mean, models_in


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        name: Its dotted name inside its section.
        type: Its type, as in Python, without an optional None.
        default: Its default in TOML's spelling; ``none`` where it is unset, ``needed`` where it must be given.
        text: What it does.
    """

    name: str
    type: str
    default: str
    text: str


def environments() -> dict[str, type[BaseModel]]:
    """The sections that ``data`` may be, by the name of the environment."""
    data = models_in(VPDConfig.model_fields["data"].annotation)
    return {model.model_fields["environment"].default: model for model in data}


def sections() -> dict[str, type[BaseModel]]:
    """All sections by name; those that depend on a choice stand under ``data.NAME`` and ``algorithm.NAME``."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in VPDConfig.model_fields.items():
        if name == "data":
            found |= {f"data.{kind}": model for kind, model in environments().items()}
        elif name == "algorithm":
            found |= {f"algorithm.{kind}": algorithm_class(kind).settings_class for kind in algorithm_names()}
        else:
            found[name] = models_in(field.annotation)[0]
    return found


def described(section: str | None = None) -> dict[str, list[Setting]]:
    """Describe a section, or all sections whose name begins with ``section.``, or all there are.

    Raises:
        ConfigError: There is no such section.
    """
    known = sections()
    chosen = [name for name in known if section is None or name == section or name.startswith(f"{section}.")]
    if not chosen:
        hint = did_you_mean(str(section), known)
        raise ConfigError(f"There is no section {section}.{hint} There are: {', '.join(known)}.")
    return {name: list(_settings_of(known[name])) for name in chosen}


def toml_value(value: Any) -> str:
    """Write a setting's value in TOML's spelling."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    return "none" if value is None else str(value)


def _settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    for key, field in model.model_fields.items():
        name, text = f"{prefix}{key}", _text(model, key)
        parts = models_in(field.annotation)
        if len(parts) == 1 and get_origin(field.annotation) is not list:
            yield Setting(name, "section", _default(field), text or " ".join((parts[0].__doc__ or "").split()))
            yield from _settings_of(parts[0], f"{name}.")
        else:
            yield Setting(name, _type(field.annotation), _default(field), text)


def _text(model: type[BaseModel], key: str) -> str:
    """Return a setting's docstring; a class that only narrows a setting leaves it to the class that it extends."""
    fields = [base.model_fields[key] for base in model.__mro__ if key in getattr(base, "model_fields", {})]
    return " ".join(next((field.description for field in fields if field.description), "").split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "its defaults" if isinstance(value, BaseModel) else toml_value(value)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " | ".join(toml_value(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type(argument) for argument in arguments if argument is not type(None))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type(argument) for argument in arguments)}]"
    return getattr(annotation, "__name__", str(annotation))
