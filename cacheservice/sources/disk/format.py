"""The format of a saved snapshot, on binary files.

Reads and writes block, so callers use a thread.

A file is ``CSSNAP``, the format's number (two bytes, big-endian) and then compressed parts (see
`cacheservice.sources.frames.parts`):

- the header, a msgpack map that describes the file (see `Header`);
- the rows, a msgpack stream of arrays of ``[key, document]``, cut into blocks of 256 KiB at any byte;
- the trailer, a msgpack map that repeats the number of rows and their bytes.

A file does not depend on the process that wrote it: it holds no hashes of the process, and its machine only in the
fields from which the age is counted.

A file without rows parts beside the saved file is its renewal: the same header, updated because a later read returned
the same rows. It is written instead of the rows, and is ignored if it is damaged or belongs to other rows.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

import msgpack  # type: ignore[import-untyped]  # ships no type information

from cacheservice.base.errors import SnapshotRejected
from cacheservice.sources.frames.header import Header, damaged, from_fields, to_fields
from cacheservice.sources.frames.parts import Blocks, PartReader, PartWriter

MAGIC = b"CSSNAP"
FORMAT = 4
_READABLE = frozenset({2, 3, FORMAT})
"""Format 3 lacks `machine`. Format 2 also lacks the server that was read, dependencies, `content_since_us`, `digest`
and the clocks of the machine."""

_START = struct.Struct(">6sH")
_HEADER, _ROWS, _TRAILER = b"H", b"R", b"T"
_CHUNK_BYTES = 64 * 1024


class SnapshotWriter:
    """Writes one file.

    The constructor writes the header, `write` the rows as they are packed, and `finish` the trailer.

    :raises OSError: from each method, if the file raises it.
    """

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._file = file
        self._header = header
        start = _START.pack(MAGIC, FORMAT)
        self._parts = PartWriter(start)
        self._blocks = Blocks()
        self.size_bytes = file.write(start)
        self._write_part(_HEADER, msgpack.packb(to_fields(header)))

    def write(self, piece: bytes) -> None:
        """Write the next piece of the packed rows."""
        for block in self._blocks.add(piece):
            self._write_part(_ROWS, block)

    def finish(self) -> None:
        """Write the remaining rows and the trailer; the file is not flushed."""
        for block in self._blocks.finish():
            self._write_part(_ROWS, block)
        trailer = {"rows": self._header.rows, "size_bytes": self._header.size_bytes}
        self._write_part(_TRAILER, msgpack.packb(trailer))

    def _write_part(self, kind: bytes, content: bytes) -> None:
        self.size_bytes += self._file.write(self._parts.part(kind, content))


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
            raise damaged(path.name, "it does not begin with a header")
        header = from_fields(_unpacked(content, path.name), path.name)
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
        raise damaged(path.name, "it holds rows")
    return header


def _blocks(parts: Generator[tuple[bytes, bytes]], header: Header, name: str) -> Generator[bytes]:
    try:
        for kind, content in parts:
            if kind == _HEADER:
                raise damaged(name, "it has two headers")
            if kind == _ROWS:
                yield content
            elif _unpacked(content, name) != {"rows": header.rows, "size_bytes": header.size_bytes}:
                raise damaged(name, "its header and its trailer differ")
    finally:
        parts.close()


def _parts(path: Path) -> Generator[tuple[bytes, bytes]]:
    """Yield kind and content of each part up to the trailer, which is the last part."""
    name = path.name
    with path.open("rb") as file:
        start = file.read(_START.size)
        if len(start) < _START.size and start.startswith(MAGIC[: len(start)]):
            raise _truncated(name, len(start))
        if not start.startswith(MAGIC):
            raise SnapshotRejected(f"{name}: it is not a saved snapshot")
        version = _START.unpack(start)[1]
        if version not in _READABLE:
            raise SnapshotRejected(f"{name}: format {version} is unknown; this version reads formats 2 to {FORMAT}")
        reader = PartReader(name, start, _HEADER + _ROWS + _TRAILER)
        while not reader.ended:
            chunk = file.read(_CHUNK_BYTES)
            if not chunk:
                raise _truncated(name, reader.read_bytes)
            for kind, content in reader.feed(chunk):
                if kind == _TRAILER and (reader.rest or file.read(1)):
                    raise damaged(name, "there is data after its trailer")
                yield kind, content


def _unpacked(content: bytes, name: str) -> object:
    try:
        unpacked: object = msgpack.unpackb(content)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise damaged(name, "its header or trailer cannot be unpacked") from error
    return unpacked


def _truncated(name: str, size_bytes: int) -> SnapshotRejected:
    return SnapshotRejected(f"{name}: it is truncated or damaged: it ends within a part, after {size_bytes} bytes")
