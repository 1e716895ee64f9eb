"""The header of a saved snapshot, and the map of plain values that stands for it in a file. No I/O."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cacheservice.base.clock import Host
from cacheservice.base.errors import SnapshotRejected
from cacheservice.cache.digest import DIGEST_BYTES
from cacheservice.cache.identity import ServerIdentity
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.config.session_rules import DEFAULT_SEARCH_PATH
from cacheservice.sources.frames.age import Age, ReadOn

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FIELDS_OF_2 = {
    "dataset": str,
    "generation": int,
    "as_of_us": int,
    "database_snapshot": str,
    "rows": int,
    "size_bytes": int,
    "columns": list,
    "fingerprint": str,
    "watch_state": str,
    "probe": str,
}
_FIELDS_OF_3 = (
    _FIELDS_OF_2
    | {"server": dict, "content_since_us": int, "digest": bytes, "dependencies": str}
    | {
        "read_wall_us": int,
        "boot": str,
        "read_boot_us": int,
    }
)
_FIELDS = _FIELDS_OF_3 | {"machine": str}
_PARTS_OF_SERVER = {
    "database": str,
    "database_oid": int,
    "role": str,
    "in_recovery": bool,
    "started_us": int | None,
    "counted_since_us": int | None,
    "timeline": int | None,
    "system_identifier": str | None,
}


@dataclass(frozen=True, slots=True)
class Header:
    """Describes a file: its dataset, generation and query, and its `Snapshot`.

    The rows are not included. `as_of` is kept to the microsecond. `size_bytes` counts all keys and documents.
    `watch_state`, `probe` and `dependencies` are the starting point of a delta, and empty if a delta is not possible.
    `server` is the server that was read; `read_on` is the time of the read by the clocks of the machine that read it.
    Both are None in files of format 2. `content_since` is the `as_of` of the first read that returned these rows, None
    if that is this read. `digest` is the digest of the rows, None if it was not known.
    """

    dataset: str
    generation: int
    as_of: datetime
    database_snapshot: str
    rows: int
    size_bytes: int
    columns: tuple[str, ...]
    fingerprint: str
    watch_state: str = ""
    probe: str = ""
    server: ServerIdentity | None = None
    content_since: datetime | None = None
    digest: int | None = None
    read_on: ReadOn | None = None
    dependencies: str = ""

    @property
    def modified_as_of(self) -> datetime:
        """Return the `as_of` of the first read that returned these rows; see `Snapshot`."""
        return self.content_since or self.as_of

    def age(self, wall_s: float, boot_s: float, host: Host) -> Age:
        """Return the age of the rows; see `ReadOn.age`."""
        if self.read_on is None:
            by_database_s = wall_s - self.as_of.timestamp()
            return Age(max(0.0, by_database_s), "it was saved by an older version, by the clock of the database alone")
        return self.read_on.age(self.as_of, wall_s, boot_s, host)

    def renews(self, saved: Header) -> bool:
        """Return whether these are the rows of the file with the header `saved`.

        Its moment may be earlier, if a standby lags more than it did.
        """
        return self._content() == saved._content()

    def _content(self) -> tuple[object, ...]:
        return (
            self.dataset,
            self.generation,
            self.rows,
            self.size_bytes,
            self.columns,
            self.fingerprint,
            self.modified_as_of,
        )

    def check(self, settings: DatasetSettings, generation: int, name: str) -> None:
        """Check that the file `name` fits the generation and the dataset.

        :raises SnapshotRejected: if the file belongs to another dataset or generation, or if the dataset's definition
            changed.
        """
        if self.dataset != settings.name:
            raise SnapshotRejected(f"{name}: it belongs to another dataset, {self.dataset!r}")
        if self.generation != generation:
            raise SnapshotRejected(f"{name}: it belongs to another generation, {self.generation}")
        if self.fingerprint != fingerprint(settings):
            raise SnapshotRejected(
                f"{name}: the query, the key, the probe, watch, settings or search_path of the dataset has changed "
                "since it was saved"
            )


def fingerprint(settings: DatasetSettings) -> str:
    """Return 32 hex digits that change with the definition of the rows.

    The definition decides which rows a dataset has, their keys, and the starting point of a delta.
    """
    watched = [[watch.table, list(watch.key)] for watch in settings.watch]
    definition: list[object] = [settings.query, list(settings.key), settings.probe, watched]
    if settings.settings or settings.search_path not in ("", DEFAULT_SEARCH_PATH):
        definition += [settings.search_path, dict(settings.settings)]
    if len(settings.key) > 1 and (settings.key_separator, settings.key_escape) != (":", False):
        definition += [settings.key_separator, settings.key_escape]
    return hashlib.blake2b(json.dumps(definition).encode(), digest_size=16).hexdigest()


def header_of(settings: DatasetSettings, snapshot: Snapshot, read_on: ReadOn) -> Header:
    """Return the header of the file in which `snapshot` is saved."""
    return Header(
        dataset=settings.name,
        generation=snapshot.generation,
        as_of=snapshot.as_of,
        database_snapshot=snapshot.database_snapshot,
        rows=snapshot.rows.count,
        size_bytes=snapshot.rows.size_bytes,
        columns=snapshot.columns,
        fingerprint=fingerprint(settings),
        watch_state=snapshot.watch_state,
        probe=snapshot.probe or "",
        server=snapshot.server,
        content_since=snapshot.content_since,
        digest=snapshot.rows.digest,
        read_on=read_on,
        dependencies=snapshot.dependencies.to_text() if snapshot.dependencies else "",
    )


def to_fields(header: Header) -> dict[str, object]:
    """Return the header as a map of plain values."""
    return {
        "dataset": header.dataset,
        "generation": header.generation,
        "as_of_us": _microseconds(header.as_of),
        "content_since_us": _microseconds(header.modified_as_of),
        "digest": b"" if header.digest is None else header.digest.to_bytes(DIGEST_BYTES, "big"),
        "database_snapshot": header.database_snapshot,
        "rows": header.rows,
        "size_bytes": header.size_bytes,
        "columns": list(header.columns),
        "fingerprint": header.fingerprint,
        "watch_state": header.watch_state,
        "probe": header.probe,
        "server": asdict(header.server) if header.server else {},
        "read_wall_us": header.read_on.wall_us if header.read_on else 0,
        "boot": header.read_on.boot if header.read_on else "",
        "read_boot_us": header.read_on.boot_us if header.read_on else 0,
        "machine": header.read_on.machine if header.read_on else "",
        "dependencies": header.dependencies,
    }


def from_fields(content: object, name: str) -> Header:
    """Return the header of the file `name` from the map of its values.

    :raises SnapshotRejected: if the map is not as `to_fields` of this version or an earlier one returns it.
    """
    fields = dict(content) if isinstance(content, Mapping) else {}
    if {key: type(value) for key, value in fields.items()} not in (_FIELDS, _FIELDS_OF_3, _FIELDS_OF_2):
        raise damaged(name, "its header does not have the fields of a known format")
    columns = tuple(fields.pop("columns"))
    as_of_us = fields.pop("as_of_us")
    server = _server(fields.pop("server", {}), name)
    wall_us, boot, boot_us = fields.pop("read_wall_us", 0), fields.pop("boot", ""), fields.pop("read_boot_us", 0)
    machine = fields.pop("machine", "")
    read_on = ReadOn(wall_us, boot, boot_us, machine) if wall_us else None
    since_us, digest = fields.pop("content_since_us", as_of_us), fields.pop("digest", b"")
    with suppress(OverflowError):
        if (
            all(isinstance(column, str) for column in columns)
            and min(fields["rows"], fields["size_bytes"]) >= 0
            and len(digest) in (0, DIGEST_BYTES)
        ):
            as_of, since = (_EPOCH + us * _MICROSECOND for us in (as_of_us, since_us))
            return Header(
                **fields,
                columns=columns,
                as_of=as_of,
                server=server,
                read_on=read_on,
                content_since=None if since == as_of else since,
                digest=int.from_bytes(digest, "big") if digest else None,
            )
    raise damaged(name, "its header has impossible values")


def damaged(name: str, problem: str) -> SnapshotRejected:
    """Return the refusal of the file `name`, whose content is not as it was written."""
    return SnapshotRejected(f"{name}: it is damaged: {problem}")


def _server(parts: Mapping[str, Any], name: str) -> ServerIdentity | None:
    if not parts:
        return None
    if parts.keys() == _PARTS_OF_SERVER.keys() and all(
        isinstance(parts[part], kind) and (kind is bool or not isinstance(parts[part], bool))
        for part, kind in _PARTS_OF_SERVER.items()
    ):
        return ServerIdentity(**parts)
    raise damaged(name, "its header names an impossible server")


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND
