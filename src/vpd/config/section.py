"""The base class of all sections of settings: it refuses unknown keys, and tells errors in sentences."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A setting cannot work; the message is a sentence that says how to mend it."""


class _SectionType(type(BaseModel)):
    """Makes sections in Python raise the same sentences as a file or ``--set``; parts of a section keep their place."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            sentences = sentences_of(error, cls.__name__, cls)  # pyright: ignore[reportArgumentType]
            raise ConfigError("\n".join(sentences)) from None


class Section(BaseModel, metaclass=_SectionType):
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
            case "union_tag_invalid" | "union_tag_not_found" | "literal_error":
                sentences.append(_choice_sentence(where, origin, item["msg"], item["input"], item.get("ctx", {})))
            case _:
                message = item["msg"].removeprefix("Value error, ")
                given = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
                sentences.append(f"{where or origin}: {message}{given}.")
    return sentences


def _choice_sentence(where: str, origin: str, message: str, given: Any, context: dict[str, Any]) -> str:
    """Say which words a setting takes, where it was given another one or none."""
    if "discriminator" not in context:
        hint = did_you_mean(str(given), re.findall(r"'([^']*)'", context["expected"]))
        return f"{where}: {message} (got {given!r}).{hint}"
    name = f"{where}.{context['discriminator'].strip(chr(39))}"
    if "tag" not in context:
        return f"The setting {name} is missing in {origin}."
    known = re.findall(r"'([^']*)'", context["expected_tags"])
    hint = did_you_mean(context["tag"], known)
    return f"{name} = {context['tag']!r} is unknown in {origin}.{hint} Known there: {', '.join(known)}."


def _known_keys(location: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """List the keys that are allowed at ``location``, where an unknown one was found."""
    models: list[type[BaseModel]] = [schema]
    for part in location[:-1]:
        found: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                found += models_in(model.model_fields[str(part)].annotation)
            elif issubclass(model, Section) and (named := model.schema_named(str(part))) is not None:
                found.append(named)
            elif any(part in _tags(field) for field in model.model_fields.values()):
                found.append(model)
        models = found or models
    keys = sorted({key for model in models for key in model.model_fields})
    given = str(location[-1])
    hint = did_you_mean(given, keys)
    if not hint and len(location) == 1:
        # Someone who comes from a trainer with flat settings names no section.
        inside = {key: name for name, field in schema.model_fields.items() for key in _keys_in(field)}
        hint = did_you_mean(given, inside, lambda key: f"{inside[key]}.{key}")
    return f"{hint} Known there: {', '.join(keys)}."


def _keys_in(field: Any) -> list[str]:
    models = models_in(field.annotation)
    return list(models[0].model_fields) if len(models) == 1 else []


def did_you_mean(given: str, known: Iterable[str], spelled: Callable[[str], str] = str) -> str:
    """Return a sentence that names the known word nearest to a given one; the text is empty where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean {spelled(near[0])}?" if near else ""


def _tags(field: Any) -> set[Any]:
    return set(getattr(field.annotation, "__args__", ()))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a setting of this type may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in models_in(part)]
