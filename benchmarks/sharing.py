"""What it would cost to share the rows between workers, instead of a copy in each.

    python -m benchmarks.sharing [--rows 1000000]

Three ways to keep the rows of a snapshot in a process that serves them: `Rows`, as each worker has them; a process
forked from one that has `Rows`, with which it shares pages until one of both writes to them (Python writes a reference
count whenever an object is used); and a hash table in a shared mapping, which a process reads with `memoryview` and
`struct`. Each is read in a child process. The memory is what only that process has.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import median
from zlib import crc32

from benchmarks.figures import mib
from cacheservice.cache.framing import bulk
from cacheservice.cache.rows import Rows, RowsBuilder

_ROUNDS = 5
_READS = 200_000
_DOCUMENT_BYTES = 152
_SLOT = struct.Struct("<Q")
_ENTRY = struct.Struct("<II")

Lookup = Callable[[bytes], bytes | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    rows = options.rows
    # Built in a child each, so that no measurement includes what another one has left.
    copied = in_child(lambda: measured(built(rows).bulk, rows))
    forked = in_child(lambda: of_fork(built(rows), rows))
    shared = in_child(lambda: of_fork_of_table(built(rows), rows))
    for name, (look_up_s, memory_bytes) in (
        ("a copy in each process", copied),
        ("pages of a forked process, after all rows were read", forked),
        ("a table in a shared mapping", shared),
    ):
        print(
            f"{name}: {1e9 * look_up_s:.0f} ns for a look-up, {look_up_s / copied[0]:.2f} of a copy's; "
            f"{mib(memory_bytes)} of its own"
        )


def rows_of(count: int) -> Iterator[list[tuple[bytes, bytes]]]:
    for begin in range(1, count + 1, 1000):
        yield [
            (b"%d" % key, (b'{"id":%d,"text":"' % key).ljust(_DOCUMENT_BYTES - 2, b"x") + b'"}')
            for key in range(begin, min(begin + 1000, count + 1))
        ]


def built(count: int) -> Rows:
    builder = RowsBuilder(lambda groups: None)
    for some in rows_of(count):
        builder.add(some)
    rows = builder.finish()
    gc.collect()
    gc.freeze()
    return rows


def measured(look_up: Lookup, count: int) -> tuple[float, int]:
    """Return the seconds of a look-up of a random key, and the memory of this process."""
    random, took_s = Random(1), []
    for _ in range(_ROUNDS):
        keys = [b"%d" % random.randint(1, count) for _ in range(_READS)]
        began_at = time.process_time()
        for key in keys:
            look_up(key)
        took_s.append((time.process_time() - began_at) / _READS)
    for key in range(1, count + 1):
        assert look_up(b"%d" % key) is not None
    return median(took_s), own_bytes()


def of_fork(rows: Rows, count: int) -> tuple[float, int]:
    return in_child(lambda: measured(rows.bulk, count))


def of_fork_of_table(rows: Rows, count: int) -> tuple[float, int]:
    table = Table(rows)
    return in_child(lambda: measured(table.get, count))


class Table:
    """Rows in a shared mapping: slots with the offsets of entries, by the CRC-32 of their keys; open addressing."""

    def __init__(self, rows: Rows) -> None:
        count = 1 << (2 * rows.count).bit_length()
        self._mask = count - 1
        self._first = count * _SLOT.size
        entries_bytes = sum(_ENTRY.size + len(key) + len(bulk(document)) for key, document in rows.items())
        self._mapping = mmap.mmap(-1, self._first + entries_bytes + 1)
        self._view = memoryview(self._mapping)
        end = self._first
        for key, document in rows.items():
            ready, place = bulk(document), crc32(key) & self._mask
            while _SLOT.unpack_from(self._view, place * _SLOT.size)[0]:
                place = (place + 1) & self._mask
            _SLOT.pack_into(self._view, place * _SLOT.size, end)
            _ENTRY.pack_into(self._view, end, len(key), len(ready))
            end += _ENTRY.size
            self._mapping[end : end + len(key) + len(ready)] = key + ready
            end += len(key) + len(ready)

    def get(self, key: bytes) -> bytes | None:
        """Return the document of `key` as a bulk string, or None."""
        mapping, place = self._mapping, crc32(key) & self._mask
        while offset := _SLOT.unpack_from(mapping, place * 8)[0]:
            key_bytes, ready_bytes = _ENTRY.unpack_from(mapping, offset)
            begin = offset + 8 + key_bytes
            if mapping[offset + 8 : begin] == key:
                return mapping[begin : begin + ready_bytes]
            place = (place + 1) & self._mask
        return None


def own_bytes() -> int:
    """Return the memory of this process that no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def in_child(measure: Callable[[], tuple[float, int]]) -> tuple[float, int]:
    """Return what a child process has measured."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write_end, struct.pack("<dQ", *measure()))
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as found:
        seconds, memory_bytes = struct.unpack("<dQ", found.read())
    os.waitpid(pid, 0)
    return seconds, memory_bytes


if __name__ == "__main__":
    main()
