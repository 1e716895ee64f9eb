"""The results of an inspection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """A finding about a dataset or the server.

    A problem would make a refresh fail, or make it differ from the configuration. `todo` is the next step, empty if
    there is none or if the text contains it.
    """

    level: Literal["problem", "hint"]
    text: str
    todo: str = ""


class Column(NamedTuple):
    name: str
    type: str


class Key(NamedTuple):
    """The key of a dataset.

    `unique` is None if it is unknown; `how` is the evidence. `fit` is whether deltas can use the key.
    """

    columns: tuple[Column, ...]
    unique: bool | None
    how: str
    fit: bool


class Size(NamedTuple):
    """Estimates of the planner.

    `document_bytes` is the average of a sample, None if no sample could be taken.
    """

    rows: int
    row_bytes: int
    document_bytes: int | None
    cost: float

    @property
    def bytes(self) -> int:
        return self.rows * (self.document_bytes or self.row_bytes)


class Node(NamedTuple):
    """A node of the plan, named as in EXPLAIN.

    `share` is its share of the whole cost without its children, 0 to 1.
    """

    name: str
    share: float


@dataclass(slots=True)
class Inspection:
    """The results for one dataset.

    A result that could not be determined is None or empty, and a finding has the reason.
    """

    name: str
    columns: tuple[Column, ...] = ()
    key: Key | None = None
    size: Size | None = None
    worst: Node | None = None
    deltas: str = ""
    findings: list[Finding] = field(default_factory=list)

    def note_columns(self, columns: tuple[Column, ...]) -> None:
        self.columns = columns

    def note_key(self, key: Key) -> None:
        self.key = key

    def note_size(self, size: Size) -> None:
        self.size = size

    def note_worst(self, node: Node | None) -> None:
        """Note the most expensive node of the plan."""
        self.worst = node

    def note_deltas(self, deltas: str) -> None:
        """Note what is known about deltas, in words."""
        self.deltas = deltas

    @property
    def ok(self) -> bool:
        return all(finding.level != "problem" for finding in self.findings)


@dataclass(slots=True)
class Server:
    """The server and the role of the session; `role` is quoted for SQL if necessary.

    :param not_logical: why the write-ahead log cannot be decoded for this role.
    """

    version: str
    database: str
    role: str
    standby: bool
    pooled: bool
    migrated: bool
    not_logical: str | None = None
    findings: list[Finding] = field(default_factory=list)
