"""Rows as a msgpack stream of arrays of ``[key, document]``."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import chain
from typing import TypeGuard

import msgpack  # type: ignore[import-untyped]  # ships no type information

from cacheservice.cache.framing import STARTS
from cacheservice.cache.rows import Rows
from cacheservice.sources.frames.header import damaged
from cacheservice.sources.frames.parts import BLOCK_BYTES

SLICE_ROWS = 512
"""Rows packed or unpacked in one turn of the reactor, which takes two thirds of a millisecond."""
_SLICE_BYTES = 128 * 1024
"""Larger slices are split, down to single rows."""

Row = tuple[bytes, bytes]


def packed(rows: Rows) -> Generator[bytes]:
    """Yield all rows in pieces of a msgpack stream.

    Each piece is packed in a third of a millisecond, unless a row is large. The generator holds the rows until it has
    ended or is closed.
    """
    for keys, documents in rows.slices(SLICE_ROWS):
        yield from packed_slice(keys, documents)


def packed_slice(keys: Sequence[bytes], documents: Sequence[bytes]) -> Iterator[bytes]:
    """Yield pieces of the stream for at most SLICE_ROWS rows, whose documents are bulk strings."""
    if sum(map(len, documents)) > _SLICE_BYTES and len(keys) > 1:
        middle = len(keys) // 2
        yield from packed_slice(keys[:middle], documents[:middle])
        yield from packed_slice(keys[middle:], documents[middle:])
        return
    start = STARTS.get
    # `unframed`, inlined. Documents are kept without their frame, because `RowsBuilder` takes them so.
    plain = [ready[start(len(ready)) or ready.index(b"\n") + 1 : -2] for ready in documents]
    yield msgpack.packb(list(zip(keys, plain, strict=True)))


def packed_keys(keys: Sequence[bytes]) -> bytes:
    """Return a piece of a stream of keys for at most SLICE_ROWS keys."""
    piece: bytes = msgpack.packb(list(keys))
    return piece


class RowsUnpacker:
    """Unpacks the rows from the blocks, in the slices in which they were packed.

    :param name: of the file or the sender, for the errors.
    :param size_bytes: the number of bytes of all keys and documents.
    """

    def __init__(self, name: str, size_bytes: int) -> None:
        self._name = name
        self._unpacker = _unpacker(size_bytes)

    def slices(self, block: bytes) -> Iterator[Sequence[Row]]:
        """Yield the rows that this block completes.

        An incomplete row waits for the next block.

        :raises SnapshotRejected: if the content is not rows.
        """
        for rows in _unpacked(self._unpacker, block, self._name, "rows"):
            if not _are_rows(rows):
                raise damaged(self._name, "it holds something that is not rows")
            yield rows


class KeysUnpacker:
    """Unpacks keys from the blocks, in the slices in which they were packed; the parameters of `RowsUnpacker`."""

    def __init__(self, name: str, size_bytes: int) -> None:
        self._name = name
        self._unpacker = _unpacker(size_bytes)

    def slices(self, block: bytes) -> Iterator[Sequence[bytes]]:
        """Yield the keys that this block completes.

        :raises SnapshotRejected: if the content is not keys.
        """
        for keys in _unpacked(self._unpacker, block, self._name, "keys"):
            if not _are_keys(keys):
                raise damaged(self._name, "it holds something that is not keys")
            yield keys


def _unpacker(size_bytes: int) -> msgpack.Unpacker:
    # An announced length allocates only the places of an array, and our arrays are never longer than this limit. The
    # bytes of an incomplete document cannot exceed the content of the blocks.
    return msgpack.Unpacker(
        use_list=False,
        max_buffer_size=min(2**32 - 1, 2 * BLOCK_BYTES + size_bytes + 16 * (SLICE_ROWS + 1)),
        max_array_len=SLICE_ROWS,
        max_str_len=0,
        max_map_len=0,
        max_ext_len=0,
    )


def _unpacked(unpacker: msgpack.Unpacker, block: bytes, name: str, what: str) -> Iterator[object]:
    try:
        unpacker.feed(block)
        yield from unpacker
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise damaged(name, f"its {what} cannot be unpacked") from error


def _are_rows(rows: object) -> TypeGuard[tuple[Row, ...]]:
    # Sets of maps, because comprehensions take twice the time.
    if type(rows) is not tuple or set(map(type, rows)) - {tuple} or set(map(len, rows)) - {2}:
        return False
    return not set(map(type, chain.from_iterable(rows))) - {bytes}


def _are_keys(keys: object) -> TypeGuard[tuple[bytes, ...]]:
    return type(keys) is tuple and not {type(key) for key in keys} - {bytes}
