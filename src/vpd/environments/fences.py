"""Finds the fenced code blocks of a completion, line by line, as CommonMark pairs fences.

Models write somewhat looser than CommonMark, and so these rules are looser in four places: a fence may be indented
however far, stand behind list marks, and a backtick fence may stand behind text on its line; a fence that names a
language ends the block before it, since a model has then forgotten to close that block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_LINE_END = re.compile(r"\r\n|\n|\r")
_BEFORE_FENCE = re.compile(r"[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*")
# The language is the first word; a title, a file name or attributes may follow after a blank, a colon or a bracket.
_LANGUAGE = re.compile(r"[{.\s]*([^\s:,;={}()\[\]|]+)")
_PYTHON = re.compile(r"(?:ipython|python|pypy|py)[-_]?(?:\d+(?:\.\d+)*)?")


@dataclass(slots=True)
class Block:
    """A fenced block.

    Attributes:
        language: The first word behind the opening fence in lower case; empty where there is none.
        closed: Whether a fence ends the block, or only the end of the text does.
        lines: The lines between the fences, without the indentation of the opening fence.
    """

    language: str
    closed: bool = False
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The lines as a text, each with its line end."""
        return "".join(f"{line}\n" for line in self.lines)

    @property
    def is_python(self) -> bool:
        """Whether the language is Python under any of its usual names, or a Python file's name stands in its place."""
        return bool(_PYTHON.fullmatch(self.language)) or self.language.endswith(".py")


@dataclass(frozen=True, slots=True)
class _Fence:
    indentation: int
    character: str
    length: int
    language: str


def read_blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a text in their order; what a longer fence encloses is part of that fence's block."""
    blocks: list[Block] = []
    fence: _Fence | None = None
    for line in _LINE_END.split(text):
        may_be_fence = "```" in line or "~~~" in line
        opening = _opening(line, behind_text=fence is None) if may_be_fence else None
        if fence is None:
            if opening is not None:
                fence = opening
                blocks.append(Block(fence.language))
            continue
        block = blocks[-1]
        rest = _before_closing(line, fence, inside_line=block.is_python or not block.language)
        is_next = opening is not None and opening.language and _ends(opening, fence)
        if rest is None and not is_next:
            block.lines.append(line)
            continue
        if rest:
            block.lines.append(rest)
        block.closed = True
        _remove_indentation(block, fence.indentation)
        fence = opening if is_next else None
        if fence is not None:
            blocks.append(Block(fence.language))
    if fence is not None:
        _remove_indentation(blocks[-1], fence.indentation)
    return blocks


def _opening(line: str, behind_text: bool) -> _Fence | None:
    """Read the line as one that opens a block, by a fence at its start or, where that is allowed, behind a text."""
    before = _BEFORE_FENCE.match(line)
    assert before is not None
    rest = line[before.end() :]
    if rest.startswith(("```", "~~~")):
        character = rest[0]
        info = rest.lstrip(character)
        if character == "~" or "`" not in info:
            return _Fence(before.end(), character, len(rest) - len(info), _language(info))
        return None
    if not behind_text:
        return None
    # Nothing but the name of Python may follow; otherwise prose about fences would open a block.
    head, _, info = line.rpartition("`")
    length = len(head) + 1 - len(head.rstrip("`"))
    language = info.strip().lower()
    if length < 3 or (language and not _PYTHON.fullmatch(language)):
        return None
    return _Fence(0, "`", length, language)


def _language(info: str) -> str:
    word = _LANGUAGE.match(info)
    return word[1].lower() if word else ""


def _ends(other: _Fence, fence: _Fence) -> bool:
    return other.character == fence.character and other.length >= fence.length


def _before_closing(line: str, fence: _Fence, inside_line: bool) -> str | None:
    """Return what stands before the fence that ends the line and the block; None where no such fence does.

    Args:
        line: The line.
        fence: The fence that opened the block.
        inside_line: Whether the closing fence may stand behind a line's text, of the program.
    """
    written = line.rstrip()
    before = written.rstrip(fence.character)
    if len(written) - len(before) < fence.length or (before.strip() and not inside_line):
        return None
    return before if before.strip() else ""


def _remove_indentation(block: Block, indentation: int) -> None:
    """Take the fence's indentation from the lines, if the first of them has it; code may also stand further left."""
    first = next((line for line in block.lines if line.strip()), "")
    width = min(indentation, len(first) - len(first.lstrip(" \t")))
    block.lines = [line[min(width, len(line) - len(line.lstrip(" \t"))) :] for line in block.lines]
