"""The format of a saved snapshot, on binary files.

Reads and writes block, so callers use a thread.

A file is ``CSSNAP``, the format's number (two bytes, big-endian) and then parts:

- the header, a msgpack map that describes the file (see `Header`);
- the rows, a msgpack stream of arrays of ``[key, document]``. The stream is cut into blocks of 256 KiB at any byte, so
  that every part has the same limit however large a document is;
- the trailer, a msgpack map that repeats the number of rows and their bytes.

A part is its kind (one byte), the length of its stored content, a CRC-32, and the stored content: a zstd frame with the
size and the checksum of its plain content. zstd's checksum covers only the plain content, and a damaged frame can still
decompress to the right content. Therefore the CRC covers the stored bytes of the part and of every part before it,
which also detects a part that is missing or from another file. A file does not depend on the process that wrote it: it
holds no hashes of the process, and its machine only in the fields from which the age is counted.

A file without rows parts beside the saved file is its renewal: the same header, updated because a later read returned
the same rows. It is written instead of the rows, and is ignored if it is damaged or belongs to other rows.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import msgpack  # type: ignore[import-untyped]  # ships no type information
import zstandard

from cacheservice.base.clock import Host
from cacheservice.base.errors import SnapshotRejected
from cacheservice.cache.digest import DIGEST_BYTES
from cacheservice.cache.identity import ServerIdentity
from cacheservice.cache.rows import STARTS, Rows
from cacheservice.config import DatasetSettings
from cacheservice.config.session_rules import DEFAULT_SEARCH_PATH
from cacheservice.sources.disk.age import Age, ReadOn

MAGIC = b"CSSNAP"
FORMAT = 4
_READABLE = frozenset({2, 3, FORMAT})
"""Format 3 lacks `machine`. Format 2 also lacks the server that was read, dependencies, `content_since_us`, `digest`
and the clocks of the machine."""
BLOCK_BYTES = 256 * 1024
SLICE_ROWS = 512
"""Rows packed or unpacked in one turn of the reactor, which takes two thirds of a millisecond."""
_SLICE_BYTES = 128 * 1024
"""Larger slices are split, down to single rows."""

_START = struct.Struct(">6sH")
_PART = struct.Struct(">cII")
_HEADER, _ROWS, _TRAILER = b"H", b"R", b"T"
_MOST_KEPT_BYTES = BLOCK_BYTES + BLOCK_BYTES // 128
"""zstd adds at most 1/256 to content that it cannot compress, and a frame header."""
_LEVEL = 1
"""The fastest level to pack, as fast to unpack as any other, and no larger than level 3 for rows of JSON (measured)."""
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

Row = tuple[bytes, bytes]


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
            raise SnapshotRejected(f"{name}: it is of another dataset, {self.dataset!r}")
        if self.generation != generation:
            raise SnapshotRejected(f"{name}: it is of another generation, {self.generation}")
        if self.fingerprint != fingerprint(settings):
            raise SnapshotRejected(
                f"{name}: the query, the key, the probe, watch, settings or search_path of the dataset was changed "
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


def packed(rows: Rows) -> Generator[bytes]:
    """Yield all rows in pieces of a msgpack stream.

    Each piece is packed in a third of a millisecond, unless a row is large. The generator holds the rows until it has
    ended or is closed.
    """
    for keys, documents in rows.slices(SLICE_ROWS):
        yield from _packed_slice(keys, documents)


def _packed_slice(keys: list[bytes], documents: list[bytes]) -> Iterator[bytes]:
    if sum(map(len, documents)) > _SLICE_BYTES and len(keys) > 1:
        middle = len(keys) // 2
        yield from _packed_slice(keys[:middle], documents[:middle])
        yield from _packed_slice(keys[middle:], documents[middle:])
        return
    start = STARTS.get
    # `unframed`, inlined. Documents are kept without their frame, because `RowsBuilder` takes them so.
    plain = [ready[start(len(ready)) or ready.index(b"\n") + 1 : -2] for ready in documents]
    yield msgpack.packb(list(zip(keys, plain, strict=True)))


class SnapshotWriter:
    """Writes one file.

    The constructor writes the header, `write` the rows as they are packed, and `finish` the trailer.

    :raises OSError: from each method, if the file raises it.
    """

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._file = file
        self._header = header
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True)
        self._waiting = bytearray()
        start = _START.pack(MAGIC, FORMAT)
        self._crc = zlib.crc32(start)
        self.size_bytes = file.write(start)
        fields = {
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
        self._write_part(_HEADER, msgpack.packb(fields))

    def write(self, piece: bytes) -> None:
        """Write the next piece of `packed`."""
        self._waiting += piece
        if len(self._waiting) >= BLOCK_BYTES:
            whole = len(self._waiting) // BLOCK_BYTES * BLOCK_BYTES
            for start in range(0, whole, BLOCK_BYTES):
                self._write_part(_ROWS, bytes(self._waiting[start : start + BLOCK_BYTES]))
            del self._waiting[:whole]

    def finish(self) -> None:
        """Write the remaining rows and the trailer; the file is not flushed."""
        if self._waiting:
            self._write_part(_ROWS, bytes(self._waiting))
        trailer = {"rows": self._header.rows, "size_bytes": self._header.size_bytes}
        self._write_part(_TRAILER, msgpack.packb(trailer))

    def _write_part(self, kind: bytes, content: bytes) -> None:
        kept = self._compressor.compress(content)
        self._crc = _part_crc(kind, kept, self._crc)
        self.size_bytes += self._file.write(_PART.pack(kind, len(kept), self._crc) + kept)


def read(path: Path) -> tuple[Header, Generator[bytes]]:
    """Return the header, and a generator of the blocks of rows.

    Close the generator to close the file earlier. The file is known to be whole only once all blocks were read; use
    nothing of it before.

    :raises SnapshotRejected: if something is wrong with the file; also raised by the generator.
    :raises OSError: if the file cannot be read; also raised by the generator.
    """
    parts = _parts(path)
    try:
        kind, content = next(parts)
        if kind != _HEADER:
            raise _damaged(path.name, "it does not begin with a header")
        header = _header(content, path.name)
    except BaseException:
        parts.close()
        raise
    return header, _blocks(parts, header, path.name)


def read_whole_header(path: Path) -> Header:
    """Return the header of a file without rows, such as a renewal.

    The whole file is checked first.

    :raises SnapshotRejected: if something is wrong with the file.
    :raises OSError: if it cannot be read.
    """
    header, blocks = read(path)
    for _ in blocks:
        blocks.close()
        raise _damaged(path.name, "it holds rows")
    return header


def _blocks(parts: Generator[tuple[bytes, bytes]], header: Header, name: str) -> Generator[bytes]:
    try:
        for kind, content in parts:
            if kind == _HEADER:
                raise _damaged(name, "it has two headers")
            if kind == _ROWS:
                yield content
            elif _unpacked(content, name) != {"rows": header.rows, "size_bytes": header.size_bytes}:
                raise _damaged(name, "its header and its trailer differ")
    finally:
        parts.close()


def _parts(path: Path) -> Generator[tuple[bytes, bytes]]:
    """Yield kind and content of each part up to the trailer, which is the last part."""
    name = path.name
    decompressor = zstandard.ZstdDecompressor()
    with path.open("rb") as file:
        start = file.read(_START.size)
        if len(start) < _START.size and start.startswith(MAGIC[: len(start)]):
            raise _truncated(name, len(start))
        if not start.startswith(MAGIC):
            raise SnapshotRejected(f"{name}: it is no saved snapshot")
        version = _START.unpack(start)[1]
        if version not in _READABLE:
            raise SnapshotRejected(f"{name}: format {version} is not known here, only 2 to {FORMAT}")
        crc = zlib.crc32(start)
        kind = b""
        while kind != _TRAILER:
            head = file.read(_PART.size)
            if len(head) < _PART.size:
                raise _truncated(name, file.tell())
            kind, length, expected_crc = _PART.unpack(head)
            # Check the length before reading, because a damaged length can be huge.
            if length > _MOST_KEPT_BYTES or kind not in (_HEADER, _ROWS, _TRAILER):
                raise _damaged(name, f"no part begins at byte {file.tell() - _PART.size}")
            kept = file.read(length)
            if len(kept) < length:
                raise _truncated(name, file.tell())
            crc = _part_crc(kind, kept, crc)
            if crc != expected_crc:
                raise _damaged(name, f"a checksum before byte {file.tell()} is wrong")
            if kind == _TRAILER and file.read(1):
                raise _damaged(name, "something follows its trailer")
            yield kind, _content(decompressor, kept, name)


def _content(decompressor: zstandard.ZstdDecompressor, kept: bytes, name: str) -> bytes:
    try:
        # zstd allocates the announced size at once, whatever `max_output_size` is.
        announced = zstandard.get_frame_parameters(kept)
        if announced.content_size > BLOCK_BYTES or not announced.has_checksum:
            raise _damaged(name, "a zstd frame is not as we write them")
        return decompressor.decompress(kept, max_output_size=BLOCK_BYTES, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _damaged(name, "a zstd frame cannot be decompressed") from error


def _header(content: bytes, name: str) -> Header:
    fields = _unpacked(content, name)
    types = {key: type(value) for key, value in fields.items()} if isinstance(fields, dict) else {}
    if types not in (_FIELDS, _FIELDS_OF_3, _FIELDS_OF_2):
        raise _damaged(name, "its header lacks something")
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
    raise _damaged(name, "its header holds what cannot be")


def _server(parts: dict[Any, Any], name: str) -> ServerIdentity | None:
    if not parts:
        return None
    if parts.keys() == _PARTS_OF_SERVER.keys() and all(
        isinstance(parts[part], kind) and (kind is bool or not isinstance(parts[part], bool))
        for part, kind in _PARTS_OF_SERVER.items()
    ):
        return ServerIdentity(**parts)
    raise _damaged(name, "its header names a server that cannot be")


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND


def _unpacked(content: bytes, name: str) -> Any:
    try:
        return msgpack.unpackb(content)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise _damaged(name, "its header or trailer cannot be unpacked") from error


class RowsUnpacker:
    """Unpacks the rows from the blocks, in the slices in which they were packed.

    :param name: the file's name, for the errors.
    """

    def __init__(self, header: Header, name: str) -> None:
        self._name = name
        # An announced length allocates only the places of an array, and our arrays are never longer than this limit.
        # The bytes of an incomplete document cannot exceed the content of the blocks.
        self._unpacker = msgpack.Unpacker(
            use_list=False,
            max_buffer_size=min(2**32 - 1, 2 * BLOCK_BYTES + header.size_bytes + 16 * (SLICE_ROWS + 1)),
            max_array_len=SLICE_ROWS,
            max_str_len=0,
            max_map_len=0,
            max_ext_len=0,
        )

    def slices(self, block: bytes) -> Iterator[Sequence[Row]]:
        """Yield the rows that this block completes.

        An incomplete row waits for the next block.

        :raises SnapshotRejected: if the content is not rows.
        """
        unpacker = self._unpacker
        try:
            unpacker.feed(block)
            for rows in unpacker:
                if type(rows) is not tuple or not _are_rows(rows):
                    raise _damaged(self._name, "what it holds are no rows")
                yield rows
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise _damaged(self._name, "its rows cannot be unpacked") from error


def _are_rows(rows: tuple[Any, ...]) -> bool:
    if {type(row) for row in rows} - {tuple} or {len(row) for row in rows} - {2}:
        return False
    return not set(map(type, chain.from_iterable(rows))) - {bytes}


def _part_crc(kind: bytes, kept: bytes, before: int) -> int:
    return zlib.crc32(kept, zlib.crc32(kind + len(kept).to_bytes(4, "big"), before))


def _truncated(name: str, size_bytes: int) -> SnapshotRejected:
    return SnapshotRejected(f"{name}: it is truncated, or damaged: it ends within a part, after {size_bytes} bytes")


def _damaged(name: str, what: str) -> SnapshotRejected:
    return SnapshotRejected(f"{name}: it is damaged: {what}")
