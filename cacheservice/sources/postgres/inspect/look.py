"""The state that every check of one dataset works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cacheservice.base.interfaces import BlockingConnection, BlockingCursor
from cacheservice.config import DatasetSettings, PostgresSettings
from cacheservice.sources.postgres.inspect.findings import Finding, Inspection, Server
from cacheservice.sources.postgres.lock_watch import LockWatch

STATEMENT_TIMEOUT_MS = 10_000
LOCK_TIMEOUT_MS = 3000


@dataclass(frozen=True, slots=True)
class Look:
    """The inspection of one dataset in a transaction of its own.

    Checks add to `found`. `cursor` and `connection` are the driver's.
    """

    connection: BlockingConnection
    cursor: BlockingCursor
    postgres: PostgresSettings
    server: Server
    dataset: DatasetSettings
    found: Inspection
    locks: LockWatch

    def add(self, level: Literal["problem", "hint"], text: str, todo: str = "") -> None:
        self.found.findings.append(Finding(level, text, todo))
