"""Only vpd.device asks which device there is and what it can do; the rest of the package asks vpd.device."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vpd

PACKAGE = Path(vpd.__file__).parent
QUESTIONS = (
    "torch.accelerator",
    "torch.cuda.is_available",
    "torch.cuda.device_count",
    "torch.cuda.is_bf16_supported",
    "torch.cpu",
    "torch.backends",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported",
    "torch._C._get_mkldnn_enabled",
)
"""Names that nobody else may use, and names that begin so."""

KINDS = {"cpu", "cuda", "mps", "xpu"}


def dotted(node: ast.AST) -> str:
    """The name that an expression spells, such as torch.cuda.is_available; "" where it is no name."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def of_device_type(node: ast.AST) -> bool:
    """Whether something within the expression is the type of a device; a function may be told it."""
    if isinstance(node, ast.Attribute) and node.attr == "type":
        return getattr(node.value, "attr", getattr(node.value, "id", "")).endswith("device")
    parts = [node.func] if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
    return any(map(of_device_type, parts))


def decisions(source: str) -> list[tuple[int, str]]:
    """The lines of a module that decide by device, and what they ask."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = dotted(node)
        if any(name == question or name.startswith(f"{question}.") for question in QUESTIONS):
            found.append((node.lineno, name))
        elif isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_cpu", "is_mps", "is_xpu"):
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Compare | ast.Match):
            words = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            subject = node if isinstance(node, ast.Compare) else node.subject
            if of_device_type(subject) or (isinstance(node, ast.Compare) and words & KINDS):
                found.append((node.lineno, "a comparison of devices"))
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch.accelerator", "torch.cuda", "torch.backends"):
            found.append((node.lineno, f"from {node.module} import"))
    return sorted(set(found))


def test_no_other_module_decides_by_device():
    found = [
        f"{path}:{line}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "device.py"
        for line, what in decisions(path.read_text())
    ]
    assert not found, "ask vpd.device instead:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "x = torch.accelerator.is_available()",
        "x = torch.cuda.is_available()",
        "x = 1 if tensor.device.type == 'cpu' else 2",
        "x = device.type != kind",
        "x = device.type.startswith(kind) == True",
        "x = self._device.type in ('cpu', 'mps')",
        "x = tensor.is_cuda",
        "x = torch.backends.mkldnn.is_available()",
        "x = str(device) == 'cuda'",
        "from torch.cuda import is_available",
        "match device.type:\n    case 'cpu': pass",
    ],
)
def test_each_kind_of_decision_is_found(line):
    assert [where for where, _ in decisions(f"import torch\n{line}")][:1] == [2]


def test_autocast_may_be_told_the_type():
    assert not decisions("with torch.autocast(tensor.device.type, enabled=False): pass")
    assert not decisions("torch.get_autocast_dtype(device.type) == torch.bfloat16")
