"""HTML that is escaped unless it was built here, so that no text of a model can become markup."""

from __future__ import annotations

from html import escape

_VOID = {"meta", "br"}


class Html(str):
    """Text that is already markup."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: str | bool) -> Html:
    """``<name attributes>children</name>``; children that are not :class:`Html` are escaped, None is left out.

    Args:
        attributes: values are escaped; True is a bare attribute, False is none. ``class_`` stands for ``class``, and
            ``aria_label`` for ``aria-label``.
    """
    opening = name
    for key, value in attributes.items():
        if value is not False:
            key = key.rstrip("_").replace("_", "-")
            opening += f" {key}" if value is True else f' {key}="{escape(str(value))}"'
    if name in _VOID:
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """The children one after the other, escaped where they are not :class:`Html`."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children if child is not None))
