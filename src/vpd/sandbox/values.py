"""Functions that write plain Python values as text and read them back; arguments and results cross the sandbox so.

Only builtin values pass, so that a value compared outside is what it seems to be: a result whose class overrides ``==``
arrives as the plain value beneath it, or not at all. The reader takes nothing for granted.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

# A program can make keys with equal hashes at will, and a dict or set of these takes quadratic time.
_MOST_EQUAL_HASHES = 16
# Integers of this size are written as JSON's own numbers, which are shorter.
_SMALL = 2**63


class NotPlainError(ValueError):
    """A value is not made of builtin values, or a text does not describe such a value."""


def dumps(value: Any) -> str:
    """Write the value as one line of text.

    Raises:
        NotPlainError: It holds something other than None, booleans, numbers, text, bytes, lists, tuples, dicts, sets.
    """
    try:
        return json.dumps(_tagged(value))
    except RecursionError:
        raise NotPlainError("a value that is nested too deeply") from None


def loads(text: str | bytes) -> Any:
    """Read the value that the text describes.

    Raises:
        NotPlainError: The text was not made by :func:`dumps`.
    """
    try:
        return _plain(json.loads(text))
    except NotPlainError:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise NotPlainError(f"unreadable: {type(error).__name__}") from None


def _tagged(value: Any) -> Any:
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if _is_numpy_scalar(value):
        return _tagged(value.item())
    if isinstance(value, int):
        if -_SMALL < value < _SMALL:
            return int.__int__(value)
        # Python reads and writes hexadecimal in linear time, and decimal not.
        return {"int": int.__format__(value, "x")}
    if isinstance(value, float):
        return {"float": float.__repr__(value)}
    if isinstance(value, complex):
        return {"complex": [float.__repr__(value.real), float.__repr__(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, list):
        return [_tagged(item) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [_tagged(item) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[_tagged(key), _tagged(item)] for key, item in dict.items(value)]}
    if isinstance(value, set):
        return {"set": [_tagged(item) for item in set.__iter__(value)]}
    if isinstance(value, frozenset):
        return {"frozenset": [_tagged(item) for item in frozenset.__iter__(value)]}
    raise NotPlainError(f"a value of type {type(value).__name__}")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise NotPlainError("unreadable: an untagged value")
    ((tag, content),) = value.items()
    match tag:
        case "int":
            return int(content, 16)
        case "float":
            return float(content)
        case "complex":
            real, imaginary = content
            return complex(float(real), float(imaginary))
        case "bytes":
            return bytes.fromhex(content)
        case "tuple":
            return tuple(_plain(item) for item in content)
        case "dict":
            pairs = [(_plain(key), _plain(item)) for key, item in content]
            _check_hashes([key for key, _ in pairs])
            return dict(pairs)
        case "set":
            return set(_check_hashes([_plain(item) for item in content]))
        case "frozenset":
            return frozenset(_check_hashes([_plain(item) for item in content]))
    raise NotPlainError("unreadable: an unknown tag")


def _check_hashes(keys: list[Any]) -> list[Any]:
    """Return the keys, of which only a few may have the same hash."""
    # Hashes themselves are small integers, so that counting them takes linear time whatever they are.
    if keys and max(Counter(map(hash, keys)).values()) > _MOST_EQUAL_HASHES:
        raise NotPlainError("a collection of many keys with the same hash")
    return keys


def _is_numpy_scalar(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.number | numpy.bool_)
