"""The frames of one publish: a snapshot, or a delta on a named generation. No I/O.

The frames of a publish are ``CSFEED``, the version of the format (two bytes, big-endian), one byte that is 1 if the
parts are compressed, and then parts (see `cacheservice.sources.frames.parts`):

- the head, a msgpack map: the header of the snapshot that results, as in a saved file, and the fields of `Head`;
- rows, a msgpack stream of arrays of ``[key, document]``: all rows of a snapshot, or the added and changed ones;
- removed keys, a msgpack stream of arrays of keys;
- the end, a msgpack map that repeats the numbers of both.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple, cast

import msgpack  # type: ignore[import-untyped]  # ships no type information

from cacheservice.base.errors import SnapshotRejected
from cacheservice.cache.changes import Change
from cacheservice.cache.delta import Delta
from cacheservice.cache.keys import MAX_KEY_BYTES
from cacheservice.cache.lag import NO_LAG, Lag
from cacheservice.cache.rows import Rows
from cacheservice.sources.frames.header import Header, damaged, from_fields, to_fields
from cacheservice.sources.frames.parts import Blocks, PartReader, PartWriter
from cacheservice.sources.frames.rows import (
    SLICE_ROWS,
    KeysUnpacker,
    Row,
    RowsUnpacker,
    packed,
    packed_keys,
    packed_slice,
)

MAGIC = b"CSFEED"
VERSION = 1

Origin = Literal["postgres", "disk", "valkey"]

_START = struct.Struct(">6sHB")
_HEAD, _ROWS, _KEYS, _END = b"H", b"R", b"K", b"E"
_KINDS = _HEAD + _ROWS + _KEYS + _END
_ORIGINS = ("postgres", "disk", "valkey")
_FIELDS = {
    "header": dict,
    "base": int,
    "put": int,
    "removed": int,
    "age_us": int,
    "origin": str,
    "change": list,
    "lag": list,
    "rolled_back_to": int,
    "age_uncertain": str,
}


@dataclass(frozen=True, slots=True)
class Head:
    """Describes a publish. The fields that `Header` lacks are those of `Snapshot`.

    :param base: the generation that the rows and keys change; 0 for a snapshot, which has all rows. A publish that
        changes no row of its own generation renews it.
    :param put: how many rows follow.
    :param removed: how many removed keys follow.
    :param age_us: the age of the snapshot in microseconds when it was sent.
    """

    header: Header
    base: int
    put: int
    removed: int
    age_us: int
    origin: Origin = "postgres"
    change: Change | None = None
    lag: Lag = NO_LAG
    rolled_back_to: int | None = None
    age_uncertain: str | None = None


class Put(NamedTuple):
    """Rows that the publish has, or adds and changes: keys and documents."""

    rows: Sequence[Row]


class Removed(NamedTuple):
    """Keys of rows that the publish removes."""

    keys: Sequence[bytes]


class End(NamedTuple):
    """The publish is complete: its numbers and checksums are right."""


Item = Head | Put | Removed | End


def encoded(head: Head, content: Rows | Delta, *, compress: bool) -> Iterator[bytes]:
    """Yield the frames of a publish.

    Each step takes about a third of a millisecond; it may yield no bytes. The iterator holds `content` until it ends.

    :param content: all rows of a snapshot, or the changes to `head.base`.
    """
    start = _START.pack(MAGIC, VERSION, compress)
    parts = PartWriter(start, compress=compress)
    yield start + parts.part(_HEAD, msgpack.packb(_to_fields(head)))
    blocks = Blocks()
    for piece in packed(content) if isinstance(content, Rows) else _packed_put(content):
        yield b"".join([parts.part(_ROWS, block) for block in blocks.add(piece)])
    last = [parts.part(_ROWS, block) for block in blocks.finish()]
    if isinstance(content, Delta):
        keys = iter(content.removed)
        while some := list(islice(keys, SLICE_ROWS)):
            last += [parts.part(_KEYS, block) for block in blocks.add(packed_keys(some))]
            yield b"".join(last)
            last.clear()
        last += [parts.part(_KEYS, block) for block in blocks.finish()]
    last.append(parts.part(_END, msgpack.packb({"put": head.put, "removed": head.removed})))
    yield b"".join(last)


def _packed_put(delta: Delta) -> Iterator[bytes]:
    rows = iter(delta.put.items())
    while some := list(islice(rows, SLICE_ROWS)):
        keys, documents = zip(*some, strict=True)
        yield from packed_slice(keys, documents)


Part = tuple[bytes, bytes]
"""The kind and the content of a part."""


class Unframer:
    """Cuts frames into parts, which it decompresses, publish after publish. It may run in a thread.

    :param name: of the sender, for the errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting = b""
        self._parts: PartReader | None = None

    def feed(self, data: bytes) -> Iterator[Part]:
        """Yield the parts that `data` completes; exhaust the iterator before more is fed.

        :raises SnapshotRejected: for frames that are damaged, or of an unknown version. Nothing may be fed afterwards.
        """
        while data or self._waiting:
            if self._parts is None:
                self._waiting += data
                if len(self._waiting) < _START.size:
                    return
                self._parts = self._begun(self._waiting[: _START.size])
                data, self._waiting = self._waiting[_START.size :], b""
            parts = self._parts
            yield from parts.feed(data)
            if not parts.ended:
                return
            data, self._parts = parts.rest, None

    def _begun(self, start: bytes) -> PartReader:
        magic, version, coding = _START.unpack(start)
        if magic != MAGIC or coding not in (0, 1):
            raise SnapshotRejected(f"{self._name}: these are not frames of a publish")
        if version != VERSION:
            raise SnapshotRejected(
                f"{self._name}: version {version} of the frames is unknown; this one reads {VERSION}"
            )
        return PartReader(self._name, start, _KINDS, compressed=coding == 1)


class Decoder:
    """Returns the content of frames, publish after publish.

    :param name: of the sender, for the errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._unframer = Unframer(name)
        self._publish: _Publish | None = None

    def feed(self, data: bytes) -> Iterator[Item]:
        """Yield what `data` completes; exhaust the iterator before more is fed.

        :raises SnapshotRejected: for frames that are damaged, or of an unknown version. Nothing may be fed afterwards.
        """
        return self.items(self._unframer.feed(data))

    def items(self, parts: Iterable[Part]) -> Iterator[Item]:
        """Yield what parts complete that another object has cut; see `feed`."""
        for kind, content in parts:
            if self._publish is None:
                self._publish = _Publish(self._name)
            yield from self._publish.take(kind, content)
            if kind == _END:
                self._publish = None


class _Publish:
    """Decodes the parts of one publish."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._head: Head | None = None
        self._rows: RowsUnpacker | None = None
        self._keys = KeysUnpacker(name, SLICE_ROWS * MAX_KEY_BYTES)
        self._put = self._removed = 0

    def take(self, kind: bytes, content: bytes) -> Iterator[Item]:
        if (kind == _HEAD) is not (self._head is None):
            raise damaged(self._name, "it does not have one head, before all else")
        if kind == _HEAD:
            self._head = head = _from_fields(_unpacked(content, self._name), self._name)
            self._rows = RowsUnpacker(self._name, head.header.size_bytes)
            yield head
        elif kind == _ROWS and self._rows is not None:
            for rows in self._rows.slices(content):
                self._put += len(rows)
                yield Put(rows)
        elif kind == _KEYS:
            for keys in self._keys.slices(content):
                self._removed += len(keys)
                yield Removed(keys)
        else:
            self._check_end(content)
            yield End()

    def _check_end(self, content: bytes) -> None:
        head = self._head
        assert head is not None, "the first part is the head"
        counted = {"put": self._put, "removed": self._removed}
        if counted != {"put": head.put, "removed": head.removed} or _unpacked(content, self._name) != counted:
            raise damaged(self._name, "its head or its end declares other numbers of rows")


def _to_fields(head: Head) -> dict[str, object]:
    lag = head.lag
    return {
        "header": to_fields(head.header),
        "base": head.base,
        "put": head.put,
        "removed": head.removed,
        "age_us": head.age_us,
        "origin": head.origin,
        "change": [] if head.change is None else list(head.change),
        "lag": [float(lag.seconds), lag.known, lag.problem],
        "rolled_back_to": head.rolled_back_to or 0,
        "age_uncertain": head.age_uncertain or "",
    }


def _from_fields(content: object, name: str) -> Head:
    fields = dict(content) if isinstance(content, Mapping) else {}
    if {key: type(value) for key, value in fields.items()} != _FIELDS:
        raise damaged(name, "its head does not have the fields of this version")
    lag, change, origin = fields["lag"], fields["change"], fields["origin"]
    numbers = [fields["base"], fields["put"], fields["removed"], fields["age_us"], fields["rolled_back_to"], *change]
    if (
        [type(part) for part in lag] != [float, bool, str]
        or len(change) not in (0, len(Change._fields))
        or any(type(number) is not int or number < 0 for number in numbers)
        or origin not in _ORIGINS
    ):
        raise damaged(name, "its head has impossible values")
    return Head(
        from_fields(fields["header"], name),
        fields["base"],
        fields["put"],
        fields["removed"],
        fields["age_us"],
        cast("Origin", origin),
        Change(*change) if change else None,
        Lag(*lag),
        fields["rolled_back_to"] or None,
        fields["age_uncertain"] or None,
    )


def _unpacked(content: bytes, name: str) -> object:
    try:
        unpacked: object = msgpack.unpackb(content)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise damaged(name, "its head or its end cannot be unpacked") from error
    return unpacked
