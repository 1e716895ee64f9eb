"""Decodes the messages of pgoutput, PostgreSQL's plugin for logical decoding, as far as keys are concerned. No I/O.

The format is version 1 of the protocol (PostgreSQL manual, 54.9 "Logical Replication Message Formats"), which all
servers since PostgreSQL 10 send: whole transactions in the order of their commits. Only the columns of watched keys are
decoded; other columns are skipped, and the changes of other tables are not looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from cacheservice.base.errors import CacheServiceError

Key = tuple[str | None, ...]
"""The values of the key columns as text; None for NULL."""


class BadChanges(CacheServiceError):
    """The server has sent something else than messages of pgoutput."""


class Begin(NamedTuple):
    """A transaction that has committed begins.

    :param xid: the lower 32 bits of its number.
    """

    xid: int


class Commit(NamedTuple):
    """The transaction is complete.

    :param end_lsn: the position in the write-ahead log behind its commit.
    """

    end_lsn: int


class Column(NamedTuple):
    """A published column.

    :param in_identity: whether it is a part of the replica identity, so that old values of it are sent.
    """

    name: str
    type_oid: int
    in_identity: bool


class Relation(NamedTuple):
    """A table, before its first change and after each change of its definition."""

    oid: int
    schema: str
    name: str
    columns: tuple[Column, ...]


class Changed(NamedTuple):
    """A row of a watched table was inserted, updated or deleted.

    :param keys: its keys before and after, without repetition; None if a part of them was not sent.
    """

    oid: int
    keys: tuple[Key, ...] | None


class Truncated(NamedTuple):
    """These tables were emptied."""

    oids: tuple[int, ...]


class Message(NamedTuple):
    """What a session has written into the log with pg_logical_emit_message."""

    prefix: str
    content: bytes


Decoded = Begin | Commit | Relation | Changed | Truncated | Message

_BEGIN = struct.Struct(">QqI")
_COMMIT = struct.Struct(">BQQq")
_RELATION_END = struct.Struct(">cH")
_COLUMN_END = struct.Struct(">Ii")
_TRUNCATE = struct.Struct(">IB")
_MESSAGE = struct.Struct(">BQ")
_OID = struct.Struct(">I")
_COUNT = struct.Struct(">H")
_LENGTH = struct.Struct(">I")

_CHANGE = struct.Struct(">IB")
_FIRST_VALUE = struct.Struct(">HBI")
_FIRST_VALUE_AT = 1 + _CHANGE.size
_FIRST_TEXT_AT = _FIRST_VALUE_AT + _FIRST_VALUE.size

_UPDATE, _DELETE = b"UD"
_CHANGES = frozenset(b"IUD")
_NULL, _UNCHANGED, _TEXT = b"nut"
_NEW, _OLD_KEY, _OLD = b"NKO"
_IGNORED = frozenset(b"OY")
"""Where a transaction comes from, and types."""


class _NotSent:
    """Stands for a value that was not sent, because it is stored outside of its row and has not changed."""


_NOT_SENT = _NotSent()
_Values = tuple[str | _NotSent | None, ...]


_ONLY_FIRST = (0,)
"""Most keys are the first column, and most changes leave them as they are: these are decoded by the shortest way."""


class Decoder:
    """Decodes messages in their order. `benchmarks.capture` measures the time per row.

    :param places: returns the places of the key columns of a watched table among its published columns; None for other
        tables, whose keys are then not known. It is called for each `Relation`.
    """

    def __init__(self, places: Callable[[Relation], Sequence[int] | None]) -> None:
        self._places_of = places
        self._relations: dict[int, Relation] = {}
        self._places: dict[int, tuple[int, ...] | None] = {}
        self._unknown: dict[int, Changed] = {}

    def renew(self) -> None:
        """Ask for the places of all tables again."""
        for relation in self._relations.values():
            self._place(relation)

    def _place(self, relation: Relation) -> None:
        places = self._places_of(relation)
        if places is not None:
            places = tuple(places)
            places = _ONLY_FIRST if places == _ONLY_FIRST else places
        self._places[relation.oid] = places
        self._unknown[relation.oid] = Changed(relation.oid, None)

    def decode(self, payload: bytes) -> Decoded | None:
        """Return the meaning of a message; None if it concerns no watched table, or nothing that matters here.

        :raises BadChanges: if it is not a message of version 1.
        """
        try:
            kind = payload[0]
            if kind in _CHANGES:
                return self._changed(payload, kind)
            return self._decode(payload)
        except (struct.error, IndexError, ValueError, KeyError) as error:
            raise BadChanges(f"the server sent a change that cannot be decoded: {type(error).__name__}") from error

    def _decode(self, payload: bytes) -> Decoded | None:
        match payload[:1]:
            case b"B":
                return Begin(_BEGIN.unpack_from(payload, 1)[2])
            case b"C":
                return Commit(_COMMIT.unpack_from(payload, 1)[2])
            case b"R":
                relation = _relation(payload)
                self._relations[relation.oid] = relation
                self._place(relation)
                return relation
            case b"T":
                count, _ = _TRUNCATE.unpack_from(payload, 1)
                return Truncated(struct.unpack_from(f">{count}I", payload, 1 + _TRUNCATE.size))
            case b"M":
                prefix, at = _string(payload, 1 + _MESSAGE.size)
                return Message(prefix, _bytes(payload, at))
            case _ if payload and payload[0] in _IGNORED:
                return None
        raise BadChanges(f"the server sent a message of the unknown kind {payload[:1]!r}")

    def _changed(self, payload: bytes, change: int) -> Changed:
        oid, row = _CHANGE.unpack_from(payload, 1)
        places = self._places[oid]
        if places is None:
            return self._unknown[oid]
        if row == _NEW:
            if places is _ONLY_FIRST and payload[_FIRST_VALUE_AT + 2] == _TEXT:
                count, _, length = _FIRST_VALUE.unpack_from(payload, _FIRST_VALUE_AT)
                end = _FIRST_TEXT_AT + length
                if not count or end > len(payload):
                    raise ValueError("a value that ends too early")
                return Changed(oid, ((payload[_FIRST_TEXT_AT:end].decode(),),))
            keys: tuple[_Values, ...] = (_values(payload, _FIRST_VALUE_AT, places)[0],)
        elif row not in (_OLD_KEY, _OLD):
            raise ValueError("neither an old nor a new row")
        else:
            old, at = _values(payload, _FIRST_VALUE_AT, places, whole=change == _UPDATE)
            if change == _DELETE:
                keys = (old,)
            elif payload[at] != _NEW:
                raise ValueError("an update without a new row")
            else:
                sent, _ = _values(payload, at + 1, places)
                new = tuple(before if after is _NOT_SENT else after for before, after in zip(old, sent, strict=True))
                keys = (new,) if old == new else (old, new)
        if any(_NOT_SENT in key for key in keys):
            return Changed(oid, None)
        return Changed(oid, cast("tuple[Key, ...]", keys))


def _values(payload: bytes, at: int, places: tuple[int, ...], *, whole: bool = False) -> tuple[_Values, int]:
    """Return the values at these places of the row that begins at a byte, and where the row ends.

    :param whole: otherwise the columns behind the last place are not looked at, and the second value is not the end.
    """
    (count,) = _COUNT.unpack_from(payload, at)
    at += 2
    if not whole:
        count = min(count, max(places) + 1)
    found: dict[int, str | _NotSent | None] = {}
    for place in range(count):
        kind = payload[at]
        at += 1
        if kind == _TEXT:
            (length,) = _LENGTH.unpack_from(payload, at)
            at += 4 + length
            if place in places:
                found[place] = _bytes(payload, at - length - 4).decode()
        elif kind == _NULL:
            found[place] = None
        elif kind == _UNCHANGED:
            found[place] = _NOT_SENT
        else:
            raise ValueError("a value of an unknown kind")
    return tuple([found[place] for place in places]), at


def _relation(payload: bytes) -> Relation:
    (oid,) = _OID.unpack_from(payload, 1)
    schema, at = _string(payload, 5)
    name, at = _string(payload, at)
    _, count = _RELATION_END.unpack_from(payload, at)
    at += _RELATION_END.size
    columns = []
    for _ in range(count):
        in_identity = payload[at] == 1
        column, at = _string(payload, at + 1)
        type_oid, _ = _COLUMN_END.unpack_from(payload, at)
        at += _COLUMN_END.size
        columns.append(Column(column, type_oid, in_identity))
    return Relation(oid, schema or "pg_catalog", name, tuple(columns))


def _bytes(payload: bytes, at: int) -> bytes:
    (length,) = _LENGTH.unpack_from(payload, at)
    if len(payload) < at + 4 + length:
        raise ValueError("a value that ends too early")
    return payload[at + 4 : at + 4 + length]


def _string(payload: bytes, at: int) -> tuple[str, int]:
    end = payload.index(0, at)
    return payload[at:end].decode(), end + 1
