"""Quotes values and names for SQL."""

from __future__ import annotations

from collections.abc import Iterable


def array(values: Iterable[object]) -> str:
    """Return a literal of an array of `values` without duplicates."""
    texts = [str(value) for value in dict.fromkeys(values)]
    if any('"' in text or "\\" in text for text in texts):
        texts = [text.replace("\\", "\\\\").replace('"', '\\"') for text in texts]
    return literal('{"' + '","'.join(texts) + '"}' if texts else "{}")


def literal(text: str) -> str:
    """Return `text` as an SQL literal, valid for any standard_conforming_strings."""
    quoted = text.replace("'", "''")
    return f"'{quoted}'" if "\\" not in quoted else " E'" + quoted.replace("\\", "\\\\") + "'"


def quoted(identifier: str) -> str:
    """Return `identifier` quoted for SQL, whatever characters it has."""
    return '"' + identifier.replace('"', '""') + '"'
