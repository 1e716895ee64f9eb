"""Bounds on the code: the size of its parts, and which module changes what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.paths import ROOT

MODULES = sorted((ROOT / "cacheservice").rglob("*.py"))
MOST_LINES, MOST_METHODS, MOST_ARGUMENTS = 400, 20, 6
ADAPTER = "cacheservice/sources/"
"""The driver has no types."""
MOST_ANY = 15
OF_LIBRARIES = {
    "seconds",  # the reactor
    "clock",  # twisted.internet.task.LoopingCall
    "atexit",  # weakref.finalize
    "autocommit",  # psycopg2's connection
    "threadFactory",  # twisted.python.threadpool.ThreadPool
    "argtypes", "restype",  # ctypes
    "__cause__", "__context__",  # exceptions
}  # fmt: skip
"""Attributes of objects of others, which are set by assignment."""


def tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def name_of(module: Path) -> str:
    return str(module.relative_to(ROOT))


def functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (each for each in ast.walk(node) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    named = function.args
    rest = [each for each in (named.vararg, named.kwarg) if each is not None]
    return [*named.posonlyargs, *named.args, *named.kwonlyargs, *rest]


def assigned(node: ast.AST) -> Iterator[ast.Attribute]:
    """The attributes that are assigned to."""
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store | ast.Del):
            yield each


def is_of_self(attribute: ast.Attribute) -> bool:
    return isinstance(attribute.value, ast.Name) and attribute.value.id in ("self", "cls")


def own_attributes(module: ast.Module) -> set[str]:
    """The attributes of the classes of a module."""
    names = {each.attr for each in assigned(module) if is_of_self(each)}
    for each in ast.walk(module):
        if isinstance(each, ast.ClassDef):
            names |= {
                line.target.id
                for line in each.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            }
    return names


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_size(module: Path) -> None:
    """Modules, classes and constructors stay small enough to be read at once."""
    text = module.read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES
    for each in ast.walk(ast.parse(text)):
        if not isinstance(each, ast.ClassDef):
            continue
        methods = [line for line in each.body if isinstance(line, ast.FunctionDef | ast.AsyncFunctionDef)]
        assert len(methods) <= MOST_METHODS, each.name
        for method in methods:
            if method.name == "__init__":
                assert len(arguments(method)) - 1 <= MOST_ARGUMENTS, each.name


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_only_the_owner_assigns(module: Path) -> None:
    """No module assigns to an attribute of another module's object."""
    parsed = tree(module)
    allowed = own_attributes(parsed) | OF_LIBRARIES
    outside = [ast.unparse(each) for each in assigned(parsed) if not is_of_self(each) and each.attr not in allowed]
    assert outside == []


def test_any() -> None:
    """Few parameters have no type, and only where the driver is adapted."""
    untyped = [
        f"{name_of(module)}: {function.name}({argument.arg})"
        for module in MODULES
        for function in functions(tree(module))
        for argument in arguments(function)
        if argument.annotation is not None
        and any(isinstance(each, ast.Name) and each.id == "Any" for each in ast.walk(argument.annotation))
    ]
    assert [each for each in untyped if not each.startswith(ADAPTER)] == []
    assert len(untyped) <= MOST_ANY, untyped
