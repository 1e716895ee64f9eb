"""Laws of quoting for SQL."""

from __future__ import annotations

from cacheservice.sources.postgres.quoting import array, literal, quoted


def test_identifiers() -> None:
    """An identifier keeps its case and all of its characters."""
    assert [quoted(name) for name in ("Plain", 'a "b"', "a'b", "a.b")] == ['"Plain"', '"a ""b"""', '"a\'b"', '"a.b"']


def test_literals() -> None:
    """A backslash means itself, whatever standard_conforming_strings is."""
    assert [literal(text) for text in ("a", "o'hare", "a\\b")] == ["'a'", "'o''hare'", " E'a\\\\b'"]


def test_arrays() -> None:
    """Each value occurs once, quoted for the array and then for SQL."""
    assert array([1, 2, 1]) == """'{"1","2"}'"""
    assert array(['a"b']) == """ E'{"a\\\\"b"}'"""
    assert array([]) == "'{}'"
