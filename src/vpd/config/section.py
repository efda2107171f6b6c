"""The base class of all sections of settings: it refuses unknown keys, and tells errors in sentences."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A setting cannot work; the message is a sentence that says how to mend it."""


class Section(BaseModel):
    """A section of settings: unknown keys are errors, and the docstring of each field describes it."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)

    @classmethod
    def schema_named(cls, name: str) -> type[BaseModel] | None:
        """The schema that a section takes under a name, such as an algorithm's; None where names choose nothing."""
        return None


def sentences_of(error: ValidationError, origin: str, schema: type[BaseModel]) -> list[str]:
    """Say what is wrong with settings that ``schema`` refused, in one sentence for each fault.

    Args:
        error: The error that pydantic raised.
        origin: The place that the settings came from, such as a file's name.
        schema: The settings' class; where a key is unknown, the sentence names the keys that the class has.
    """
    sentences = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        match item["type"]:
            case "extra_forbidden":
                sentences.append(f"Unknown setting {where} in {origin}.{_known_keys(item['loc'], schema)}")
            case "missing":
                sentences.append(f"The setting {where} is missing in {origin}.")
            case _:
                message = item["msg"].removeprefix("Value error, ")
                given = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
                sentences.append(f"{where or origin}: {message}{given}.")
    return sentences


def _known_keys(location: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """List the keys that are allowed at ``location``, where an unknown one was found."""
    models: list[type[BaseModel]] = [schema]
    for part in location[:-1]:
        found: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                found += _models_in(model.model_fields[str(part)].annotation)
            elif issubclass(model, Section) and (named := model.schema_named(str(part))) is not None:
                found.append(named)
            elif any(part in _tags(field) for field in model.model_fields.values()):
                found.append(model)
        models = found or models
    keys = sorted({key for model in models for key in model.model_fields})
    return f" Known there: {', '.join(keys)}."


def _tags(field: Any) -> set[Any]:
    return set(getattr(field.annotation, "__args__", ()))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
