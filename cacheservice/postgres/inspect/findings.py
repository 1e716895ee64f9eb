"""What an inspection says: records without behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """Something to know about a dataset or the server; a problem is what would keep a refresh from succeeding, or
    from doing what the configuration says. `todo` is what to do about it, empty if nothing or if the text says it."""

    level: Literal["problem", "hint"]
    text: str
    todo: str = ""


class Column(NamedTuple):
    name: str
    type: str


class Key(NamedTuple):
    """`unique` is None where nobody knows; `how` says how it is known. `fit` is whether deltas can go by it."""

    columns: tuple[Column, ...]
    unique: bool | None
    how: str
    fit: bool


class Size(NamedTuple):
    """Estimates of the planner; `document_bytes` is the average of a sample, None if it could not be taken."""

    rows: int
    row_bytes: int
    document_bytes: int | None
    cost: float

    @property
    def bytes(self) -> int:
        return self.rows * (self.document_bytes or self.row_bytes)


class Node(NamedTuple):
    """A node of the plan, named as EXPLAIN does, and its share of the whole cost without its children, 0 to 1."""

    name: str
    share: float


@dataclass(slots=True)
class Inspection:
    """What was found of one dataset; what could not be found out is None or empty, and a finding says why."""

    name: str
    columns: tuple[Column, ...] = ()
    key: Key | None = None
    size: Size | None = None
    worst: Node | None = None
    deltas: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.level != "problem" for finding in self.findings)


@dataclass(slots=True)
class Server:
    """Whom we are connected to, and as whom: `role` is quoted where SQL needs it."""

    version: str
    database: str
    role: str
    standby: bool
    pooled: bool
    migrated: bool
    findings: list[Finding] = field(default_factory=list)
