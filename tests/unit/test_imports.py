"""The import rules of the tests, beside those of the package in pyproject.toml."""

from __future__ import annotations

import ast

from tests.kit.paths import ROOT


def test_no_test_module_is_imported() -> None:
    """What test modules share is in tests/kit: nobody imports a test module."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
        for folder in ("tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in imported(node)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))
    ]
    assert found == []


def imported(node: ast.AST) -> list[str]:
    """Return the modules, and the names in them, that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []
