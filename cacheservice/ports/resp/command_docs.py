"""The catalogue of commands in `command_docs.json`, as COMMAND returns it.

It is taken from Redis. `tests/unit/test_resp_commands.py` compares it with the commands that the port runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from cacheservice.ports.resp.reply import Status, Value

_FLAGS = frozenset({"flags", "categories"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One command: its name, its arity, its flags, its keys and its ACL categories, and its documentation."""

    name: str
    arity: int
    flags: frozenset[Status]
    keys: list[int]
    categories: frozenset[Status]
    docs: Value

    def values(self) -> list[Value]:
        """Return the entry in the form of COMMAND INFO."""
        return [self.name, self.arity, self.flags, *self.keys, self.categories, [], [], []]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The commands of the port by name, and the names of the commands of Redis that write."""

    entries: Mapping[str, Entry]
    writes: frozenset[bytes]


@cache
def catalogue() -> Catalogue:
    """Return the catalogue of this package."""
    text = resources.files(__package__).joinpath("command_docs.json").read_text("utf-8")
    loaded = json.loads(text, object_hook=_flags_as_statuses)
    entries = {name: Entry(name=name, **fields) for name, fields in loaded["commands"].items()}
    return Catalogue(entries, frozenset(name.encode() for name in loaded["writes"]))


def _flags_as_statuses(fields: dict[str, Value]) -> dict[str, Value]:
    """Make the flags of an object statuses, as Redis sends them; redis-cli exits on any other type."""
    flags = {name: frozenset(map(Status, fields[name])) for name in _FLAGS & fields.keys()}  # type: ignore[arg-type]
    return fields | flags
