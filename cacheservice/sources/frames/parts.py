"""The parts that frame a snapshot, as bytes in and bytes out. No I/O.

A part is its kind (one byte), the length of its stored content, a CRC-32, and the stored content: a zstd frame with the
size and the checksum of its plain content, or the plain content itself. zstd's checksum covers only the plain content,
and a damaged frame can still decompress to the right content. Therefore the CRC covers the stored bytes of the part and
of every part before it, which also detects a part that is missing or from another snapshot.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import zstandard

from cacheservice.sources.frames.header import damaged

BLOCK_BYTES = 256 * 1024
"""The limit of a part's plain content, so that every part has the same limit however large a document is."""

_PART = struct.Struct(">cII")
_MOST_STORED_BYTES = BLOCK_BYTES + BLOCK_BYTES // 128
"""zstd adds at most 1/256 to content that it cannot compress, and a frame header."""
_LEVEL = 1
"""The fastest level to pack, as fast to unpack as any other, and no larger than level 3 for rows of JSON (measured)."""


class PartWriter:
    """Frames the parts that follow the bytes `start`.

    :param compress: whether the content is stored as zstd frames.
    """

    def __init__(self, start: bytes, *, compress: bool = True) -> None:
        self._crc = zlib.crc32(start)
        self._compressor = None
        if compress:
            self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True)

    def part(self, kind: bytes, content: bytes) -> bytes:
        """Return the next part; `content` has at most BLOCK_BYTES."""
        stored = content if self._compressor is None else self._compressor.compress(content)
        self._crc = _part_crc(kind, stored, self._crc)
        return _PART.pack(kind, len(stored), self._crc) + stored


class PartReader:
    """Returns the parts that follow the bytes `start`.

    `ended` is True after the part of the last kind; `rest` has the bytes behind it.

    :param name: of the file or the sender, for the errors.
    :param kinds: the known kinds, one byte each; a part of the last one is the last part.
    :param compressed: whether the content is stored as zstd frames.
    """

    def __init__(self, name: str, start: bytes, kinds: bytes, *, compressed: bool = True) -> None:
        self._name = name
        self._kinds = [kinds[place : place + 1] for place in range(len(kinds))]
        self._offset = len(start)
        self._crc = zlib.crc32(start)
        self._waiting = bytearray()
        self._decompressor = zstandard.ZstdDecompressor() if compressed else None
        self.ended = False

    @property
    def read_bytes(self) -> int:
        """The number of bytes so far, with those of an incomplete part."""
        return self._offset + len(self._waiting)

    @property
    def rest(self) -> bytes:
        """The bytes that belong to no part yet."""
        return bytes(self._waiting)

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield the kind and the content of each part that `data` completes.

        :raises SnapshotRejected: for bytes that are not parts, or not unchanged; nothing may be fed afterwards.
        """
        self._waiting += data
        while not self.ended and len(self._waiting) >= _PART.size:
            kind, length, expected_crc = _PART.unpack_from(self._waiting)
            # The length is checked before the content has arrived, because a damaged length can be huge.
            if length > _MOST_STORED_BYTES or kind not in self._kinds:
                raise damaged(self._name, f"no part begins at byte {self._offset}")
            size = _PART.size + length
            if len(self._waiting) < size:
                return
            stored = bytes(self._waiting[_PART.size : size])
            del self._waiting[:size]
            self._offset += size
            self._crc = _part_crc(kind, stored, self._crc)
            if self._crc != expected_crc:
                raise damaged(self._name, f"a checksum before byte {self._offset} is wrong")
            self.ended = kind == self._kinds[-1]
            yield kind, self._content(stored)

    def _content(self, stored: bytes) -> bytes:
        if self._decompressor is None:
            if len(stored) > BLOCK_BYTES:
                raise damaged(self._name, "a part is too long")
            return stored
        try:
            # zstd allocates the announced size at once, whatever `max_output_size` is.
            announced = zstandard.get_frame_parameters(stored)
            if announced.content_size > BLOCK_BYTES or not announced.has_checksum:
                raise damaged(self._name, "a zstd frame has no checksum, or announces too much content")
            return self._decompressor.decompress(stored, max_output_size=BLOCK_BYTES, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise damaged(self._name, "a zstd frame cannot be decompressed") from error


class Blocks:
    """Cuts a stream of bytes into blocks of BLOCK_BYTES."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def add(self, piece: bytes) -> Iterator[bytes]:
        """Yield the blocks that `piece` completes."""
        self._waiting += piece
        whole = len(self._waiting) // BLOCK_BYTES * BLOCK_BYTES
        for start in range(0, whole, BLOCK_BYTES):
            yield bytes(self._waiting[start : start + BLOCK_BYTES])
        del self._waiting[:whole]

    def finish(self) -> Iterator[bytes]:
        """Yield the last block, if there is anything left."""
        if self._waiting:
            yield bytes(self._waiting)
            self._waiting.clear()


def _part_crc(kind: bytes, stored: bytes, before: int) -> int:
    return zlib.crc32(stored, zlib.crc32(kind + len(stored).to_bytes(4, "big"), before))
