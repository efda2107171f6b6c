"""Reads boxed answers and compares them with the right ones as mathematics.

math-verify does the comparison. What it misreads is brought into a form that it reads: marks of bold type, a full stop
behind the answer, scientific notation. Numbers with a base are compared here, because it drops the base.
"""

from __future__ import annotations

import re
from typing import Any

LONGEST_ANSWER = 2000
"""How many characters an answer may have, where the right one is not longer itself."""

_BRACES = re.compile(r"\\boxed[ \t]*\{|\\[{}\\](?!boxed)|[{}]")
_BOLD = re.compile(r"\\(?:mathbf|boldsymbol|bm|pmb|bfseries|bf)(?![a-zA-Z])")
_TRAILING = re.compile(r"(?:\\[,;:! ]|[,;:]|(?<![.])(?<!\\right)\.)\Z")
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,9})(?![\w.])")
_BLANKS = re.compile(r"\{,\}|\\[,;:! ]|\s+")
_WITH_BASE = re.compile(
    r"\(?(?:\\(?:text|mathrm)\{)?([0-9A-Za-z]{1,400})\}?\)?"
    r"_\{?(?:\\(?:text|mathrm)\{)?\(?(?:base)?([0-9]{1,2}|[a-z]+)\)?\}{0,2}"
)
_HUGE_FACTORIAL = re.compile(r"\d{6,}\}*\)*!")
_BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "sixteen": 16,
}  # fmt: skip


def last_boxed(text: str) -> str | None:
    """Return the content of the last complete ``\\boxed{...}``, with balanced braces inside; None without one.

    An escaped brace is no brace. The text is read once, however many boxes are never closed.
    """
    open_braces: list[re.Match[str]] = []
    found = (-1, -1)
    for brace in _BRACES.finditer(text):
        if brace[0] == "}":
            opening = open_braces.pop() if open_braces else None
            if opening is not None and len(opening[0]) > 1:
                found = max(found, (opening.end(), brace.start()))
        elif brace[0][-1] == "{" and brace[0] != "\\{":
            open_braces.append(brace)
    return text[slice(*found)] if found[0] >= 0 else None


def compare(answer: str, reference: str) -> str:
    """Return ``right``, ``wrong``, ``unreadable``, ``too long`` or ``too large``.

    A judge's process calls this function, and the pool ends that process at the time limit.
    """
    if len(answer) > max(LONGEST_ANSWER, 2 * len(reference)):
        return "too long"
    answer, reference = normal_form(answer), normal_form(reference)
    if not answer:
        return "unreadable"
    if _BLANKS.sub("", answer) == _BLANKS.sub("", reference):
        return "right"
    same = _same_with_base(answer, reference)
    if same is not None:
        return "right" if same else "wrong"
    if _HUGE_FACTORIAL.search(_BLANKS.sub("", answer)) or _HUGE_FACTORIAL.search(_BLANKS.sub("", reference)):
        return "too large"
    try:
        return _compare_as_mathematics(answer, reference)
    except (MemoryError, RecursionError):
        return "too large"


def normal_form(text: str) -> str:
    """Remove bold type, dollar signs around the text and punctuation behind it; write ``1e5`` as a power of ten."""
    text = _BOLD.sub("", text.replace("\\textbf", "\\text").replace("**", "")).strip()
    shorter = None
    while shorter != text:
        shorter, text = text, _TRAILING.sub("", text).strip()
        if len(text) > 2 and text[0] == text[-1] == "$" and text[-2] != "\\":
            text = text.strip("$").strip()
    return _SCIENTIFIC.sub(lambda found: f"{found[1]} \\times 10^{{{int(found[2])}}}", text)


def _same_with_base(answer: str, reference: str) -> bool | None:
    """Compare two numbers of which at least one has its base as an index; return None for anything else.

    With two bases both digits and base must be equal. A base that only one side names may be that of the question, so
    that equal digits are right; and a number with a base is right where the plain reference is its value.
    """
    given, right = _with_base(answer), _with_base(reference)
    if given is not None and right is not None:
        return given == right
    if right is not None:
        return _plain_digits(answer) == right[0] if _plain_digits(answer) is not None else None
    if given is None or not _BLANKS.sub("", reference).isalnum():
        return None
    plain = _plain_digits(reference)
    return plain == given[0] or plain == str(int(*given))


def _with_base(text: str) -> tuple[str, int] | None:
    found = _WITH_BASE.fullmatch(_BLANKS.sub("", text))
    if found is None:
        return None
    base = int(found[2]) if found[2].isdigit() else _BASES.get(found[2], 0)
    try:
        int(found[1], base if base >= 2 else 1)
    except ValueError:
        # The base is none, or has no such digits: an index of a sequence, such as a_2.
        return None
    return found[1].lower().lstrip("0") or "0", base


def _plain_digits(text: str) -> str | None:
    digits = re.sub(r"\\text\{(.*)\}", r"\1", _BLANKS.sub("", text).replace(",", ""))
    return (digits.lower().lstrip("0") or "0") if digits.isalnum() and digits.isascii() else None


def _compare_as_mathematics(answer: str, reference: str) -> str:
    from math_verify import parse, verify

    # None switches math-verify's alarm off, although its annotations do not allow None.
    no_alarm: Any = None
    gold, given = (parse(f"\\boxed{{{text}}}", parsing_timeout=no_alarm) for text in (reference, answer))
    if not given:
        return "unreadable"
    return "right" if verify(gold, given, timeout_seconds=no_alarm) else "wrong"
