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

import struct
import zlib
from collections.abc import Generator, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import msgpack  # type: ignore[import-untyped]  # ships no type information
import zstandard

from cacheservice.base.errors import SnapshotRejected
from cacheservice.cache.framing import STARTS
from cacheservice.cache.rows import Rows
from cacheservice.sources.disk.header import Header, damaged, from_fields, to_fields

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

Row = tuple[bytes, bytes]


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
        self._write_part(_HEADER, msgpack.packb(to_fields(header)))

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
    decompressor = zstandard.ZstdDecompressor()
    with path.open("rb") as file:
        start = file.read(_START.size)
        if len(start) < _START.size and start.startswith(MAGIC[: len(start)]):
            raise _truncated(name, len(start))
        if not start.startswith(MAGIC):
            raise SnapshotRejected(f"{name}: it is not a saved snapshot")
        version = _START.unpack(start)[1]
        if version not in _READABLE:
            raise SnapshotRejected(f"{name}: format {version} is unknown; this version reads formats 2 to {FORMAT}")
        crc = zlib.crc32(start)
        kind = b""
        while kind != _TRAILER:
            head = file.read(_PART.size)
            if len(head) < _PART.size:
                raise _truncated(name, file.tell())
            kind, length, expected_crc = _PART.unpack(head)
            # Check the length before reading, because a damaged length can be huge.
            if length > _MOST_KEPT_BYTES or kind not in (_HEADER, _ROWS, _TRAILER):
                raise damaged(name, f"no part begins at byte {file.tell() - _PART.size}")
            kept = file.read(length)
            if len(kept) < length:
                raise _truncated(name, file.tell())
            crc = _part_crc(kind, kept, crc)
            if crc != expected_crc:
                raise damaged(name, f"a checksum before byte {file.tell()} is wrong")
            if kind == _TRAILER and file.read(1):
                raise damaged(name, "there is data after its trailer")
            yield kind, _content(decompressor, kept, name)


def _content(decompressor: zstandard.ZstdDecompressor, kept: bytes, name: str) -> bytes:
    try:
        # zstd allocates the announced size at once, whatever `max_output_size` is.
        announced = zstandard.get_frame_parameters(kept)
        if announced.content_size > BLOCK_BYTES or not announced.has_checksum:
            raise damaged(name, "a zstd frame has no checksum, or announces too much content")
        return decompressor.decompress(kept, max_output_size=BLOCK_BYTES, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise damaged(name, "a zstd frame cannot be decompressed") from error


def _unpacked(content: bytes, name: str) -> object:
    try:
        unpacked: object = msgpack.unpackb(content)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise damaged(name, "its header or trailer cannot be unpacked") from error
    return unpacked


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
                    raise damaged(self._name, "it holds something that is not rows")
                yield rows
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise damaged(self._name, "its rows cannot be unpacked") from error


def _are_rows(rows: tuple[tuple[object, ...], ...]) -> bool:
    if {type(row) for row in rows} - {tuple} or {len(row) for row in rows} - {2}:
        return False
    return not set(map(type, chain.from_iterable(rows))) - {bytes}


def _part_crc(kind: bytes, kept: bytes, before: int) -> int:
    return zlib.crc32(kept, zlib.crc32(kind + len(kept).to_bytes(4, "big"), before))


def _truncated(name: str, size_bytes: int) -> SnapshotRejected:
    return SnapshotRejected(f"{name}: it is truncated or damaged: it ends within a part, after {size_bytes} bytes")
