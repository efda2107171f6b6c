"""Functions that build HTML and escape all other text, so that no text of a model can become markup."""

from __future__ import annotations

from html import escape

_VOID = {"meta", "br"}


class Html(str):
    """Text that is already markup."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: str | bool) -> Html:
    """Build ``<name attributes>children</name>``.

    Args:
        name: The element's name.
        children: The contents; those that are not :class:`Html` are escaped, and None is left out.
        attributes: The attributes, with escaped values. True makes a bare attribute, and False leaves it out.
            ``class_`` stands for ``class``, and ``aria_label`` for ``aria-label``.
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
    """Join the children one after the other, escaped where they are not :class:`Html`; None is left out."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children if child is not None))
