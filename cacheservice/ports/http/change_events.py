"""Renders the events of a change stream, as server-sent events or as NDJSON; docs/changes.md is their contract.

In both forms an event is one JSON object on one line. A server-sent event has its name and its position in further
lines, so that a browser sends the position of the last complete generation when it reconnects.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from cacheservice.base.interfaces import Json
from cacheservice.base.text import iso, seconds
from cacheservice.cache.change_log import Position
from cacheservice.cache.delta import Delta
from cacheservice.cache.framing import STARTS
from cacheservice.cache.rows import Rows
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ports.http.bodies import (
    PIECE_BYTES,
    SLICE_ROWS,
    Bulks,
    Keys,
    cut,
    json_strings,
    on_one_line,
    row_texts,
)

SSE_TYPE, NDJSON_TYPE = b"text/event-stream", b"application/x-ndjson"


class State(NamedTuple):
    """What the events report of a snapshot. It does not keep the snapshot in memory."""

    position: Position
    rows: int
    as_of: str
    read_at: float

    @classmethod
    def of(cls, snapshot: Snapshot, position: Position) -> State:
        return cls(position, snapshot.rows.count, iso(snapshot.as_of), snapshot.read_at)


class Form:
    """One form of the events.

    :param content_type: SSE_TYPE or NDJSON_TYPE.
    """

    def __init__(self, content_type: bytes) -> None:
        self.content_type = content_type
        self._is_sse = content_type == SSE_TYPE
        before = self._before("rows")
        self._put_head = before + b'{"event":"rows","put":{'
        self._put_tail = b'},"removed":[]}' + self._after
        self._removed_head = before + b'{"event":"rows","put":{},"removed":['
        self._removed_tail = b"]}" + self._after

    @property
    def _after(self) -> bytes:
        return b"\n\n" if self._is_sse else b"\n"

    def _before(self, kind: str) -> bytes:
        return b"event: %b\ndata: " % kind.encode() if self._is_sse else b""

    def hello(self, retry_ms: int) -> bytes:
        """Return the first bytes of a stream: the pause before a browser reconnects, or nothing."""
        return b"retry: %d\n\n" % retry_ms if self._is_sse else b""

    def alive(self) -> bytes:
        """Return a sign of life: a comment, or an event without members."""
        return b": alive\n\n" if self._is_sse else b'{"event":"alive"}\n'

    def snapshot(self, dataset: str, state: State) -> bytes:
        """Return the event that begins a snapshot: the rows that follow replace all rows."""
        members: dict[str, Json] = {
            "dataset": dataset,
            "generation": state.position.generation,
            "rows": state.rows,
        }
        return self._event("snapshot", members)

    def generation(self, kind: str, dataset: str, state: State, now: float) -> bytes:
        """Return the event that ends a generation, or confirms it.

        :param kind: "generation", or "renewed" if no rows came before it.
        :param now: the monotonic clock in seconds, for the age.
        """
        members: dict[str, Json] = {
            "dataset": dataset,
            "generation": state.position.generation,
            "position": str(state.position),
            "rows": state.rows,
            "as_of": state.as_of,
            "age_s": seconds(now - state.read_at),
        }
        return self._event(kind, members, state.position)

    def ended(self, dataset: str) -> bytes:
        """Return the last event of a dataset that was removed."""
        return self._event("ended", {"dataset": dataset})

    def _event(self, kind: str, members: dict[str, Json], position: Position | None = None) -> bytes:
        line = json.dumps({"event": kind, **members}, separators=(",", ":")).encode()
        number = b"id: %b\n" % str(position).encode() if self._is_sse and position is not None else b""
        return number + self._before(kind) + line + self._after

    # Rows

    def rows(self, rows: Rows) -> Iterator[Iterator[bytes]]:
        """Yield the events of all rows, each in its pieces: several only for a large document."""
        return self._put(rows.slices(SLICE_ROWS))

    def delta(self, delta: Delta) -> Iterator[Iterator[bytes]]:
        """Yield the events of a delta, each in its pieces."""
        yield from self._put(_slices(delta))
        for keys in _bounded(delta.removed):
            yield iter((self._removed_head + _quoted(keys) + self._removed_tail,))

    def _put(self, slices: Iterable[tuple[Keys, Bulks]]) -> Iterator[Iterator[bytes]]:
        for text, document in row_texts(slices, _members, _member_head):
            yield self._large(text, document) if document else iter((self._put_head + text + self._put_tail,))

    def _large(self, text: bytes, document: bytes) -> Iterator[bytes]:
        yield self._put_head + text
        yield from cut(on_one_line(document))
        yield self._put_tail


FORMS = {content_type: Form(content_type) for content_type in (SSE_TYPE, NDJSON_TYPE)}
"""The first is the default."""


def _members(keys: Keys, documents: Bulks) -> bytes:
    start = STARTS.get
    # `unframed`, inlined: a third of the time. The keys have no line breaks either, because JSON escapes them.
    return on_one_line(
        b",".join(
            [
                b'"%b":%b' % (key, ready[start(len(ready)) or ready.index(b"\n") + 1 : -2])
                for key, ready in zip(json_strings(keys), documents, strict=True)
            ]
        )
    )


def _member_head(key: bytes) -> bytes:
    return b'"%b":' % json_strings([key])[0]


def _quoted(keys: Keys) -> bytes:
    return b'"' + b'","'.join(json_strings(keys)) + b'"'


def _slices(delta: Delta) -> Iterator[tuple[Keys, Bulks]]:
    rows = iter(delta.put.items())
    while some := list(islice(rows, SLICE_ROWS)):
        yield [key for key, _ in some], [ready for _, ready in some]


def _bounded(keys: Iterable[bytes]) -> Iterator[Keys]:
    """Yield keys in lists of about 64 KiB at most."""
    some: Keys = []
    size_bytes = 0
    for key in keys:
        some.append(key)
        size_bytes += len(key)
        if size_bytes >= PIECE_BYTES or len(some) >= SLICE_ROWS:
            yield some
            some, size_bytes = [], 0
    if some:
        yield some
