"""Rooms import what CONTRIBUTING says, without a cycle, and files and functions are small enough for one sitting."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "vpd"


def rooms() -> dict[str, set[str]]:
    """The table of CONTRIBUTING: each room with the rooms that it may import."""
    table = re.search(r"```rooms\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    assert table is not None
    lines = (line.split(":") for line in table[1].strip().splitlines())
    return {room.strip(): set(others.split()) for room, others in lines}


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"vpd.{alias.name}" for alias in node.names] if node.module == "vpd" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("vpd.")}
    return found


def test_each_room_imports_what_contributing_says_and_nothing_else():
    allowed, actual = rooms(), {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        actual.setdefault(room, set()).update(imported(path) - {room})
    # The public names are imported from wherever they are.
    del actual["__init__"]
    assert actual == allowed


def test_no_room_is_above_another_and_below_it():
    left, order = rooms(), []
    while left:
        free = [room for room, others in left.items() if not others & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        order += free
        left = {room: others for room, others in left.items() if room not in free}
    assert order.index("losses") < order.index("policy") < order.index("algorithms") < order.index("trainer")


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    """The lines of a function without its docstring, blank lines and comments."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    first = function.lineno - 1
    lines = source[first : function.body[0].lineno - 1]
    lines += source[body[0].lineno - 1 : function.end_lineno] if body else []
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def test_files_and_functions_are_read_in_one_sitting():
    trainer = (PACKAGE / "trainer.py").read_text().splitlines()
    assert len(trainer) <= 300
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text().splitlines()
        assert len(source) <= 400, f"{path} has {len(source)} lines"
        for node in ast.walk(ast.parse("\n".join(source))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = code_lines(node, source)
                assert count <= 60, f"{path}: {node.name} has {count} lines of code"
