"""The words that make our prose hard to read are kept out of pages, `deploy/`, docstrings and comments.

docs/glossary.md has the words to use; CONTRIBUTING.md has the rules.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.paths import ROOT

BANNED = re.compile(
    r"\b(tells?|told|telling|says?|said|anew|mend(?:s|ed|ing)?|whoever|whatever becomes|of which|of whose|amid"
    r"|for want of|g[ai]ves? back)\b",
    re.IGNORECASE,
)
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(
        path for path in (ROOT / "deploy").rglob("*") if path.suffix in (".json", ".service", ".toml", ".yaml", ".yml")
    ),
]
MODULES = sorted(path for folder in ("cacheservice", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def prose_of(module: str) -> Iterator[tuple[int, str]]:
    """Yield the docstrings and the comments of a module, each with its line."""
    for node in ast.walk(ast.parse(module)):
        for each in getattr(node, "body", ()) if isinstance(getattr(node, "body", ()), list) else ():
            if (
                isinstance(each, ast.Expr)
                and isinstance(each.value, ast.Constant)
                and isinstance(each.value.value, str)
            ):
                yield each.lineno, each.value.value
    for token in tokenize.generate_tokens(io.StringIO(module).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def texts_of(module: str) -> Iterator[tuple[int, str]]:
    """Yield the literals of a module that are for people, each with its line: those with blanks, docstrings aside."""
    tree = ast.parse(module)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    literals = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
    for node in literals:
        if isinstance(node.value, str) and " " in node.value and "SELECT" not in node.value:
            yield node.lineno, node.value


def without_code(page: str) -> str:
    """Return a page without its blocks and pieces of code, which quote the program."""
    page = re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", "", page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages(page: Path) -> None:
    """No page has a banned word outside of code."""
    assert BANNED.findall(without_code(page.read_text(encoding="utf-8"))) == []


def test_modules() -> None:
    """No docstring and no comment of the package, the tests and the benchmarks has a banned word."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]}"
        for path in MODULES
        for line, text in prose_of(path.read_text(encoding="utf-8"))
        for match in BANNED.finditer(re.sub(r":param \w+:", "", text))
    ]
    assert found == []


def test_messages() -> None:
    """No help text, error, hint or sentence of the package has a banned word."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]}"
        for path in (ROOT / "cacheservice").rglob("*.py")
        for line, text in texts_of(path.read_text(encoding="utf-8"))
        for match in BANNED.finditer(text)
    ]
    assert found == []


def test_a_banned_word_is_found() -> None:
    """The check finds words in docstrings and comments, and not in code."""
    module = 'def tell():\n    """It is told\n    anew."""\n    # whoever\n    return "says"\n'
    assert [BANNED.findall(text) for _, text in prose_of(module)] == [["told", "anew"], ["whoever"]]
    assert BANNED.findall(without_code("It says `told`.\n```sh\nmend it\n```\n")) == ["says"]
