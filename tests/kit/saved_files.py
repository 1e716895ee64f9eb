"""Saved files and their rows."""

from __future__ import annotations

import io
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cacheservice.cache.rows import Rows
from cacheservice.config import DatasetSettings
from cacheservice.sources.disk.format import SnapshotWriter, read
from cacheservice.sources.frames.header import Header, fingerprint
from cacheservice.sources.frames.rows import RowsUnpacker, packed
from tests.kit.datasets import Table, declared

AS_OF = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def saved_dataset(name: str = "products", **keys: Any) -> DatasetSettings:
    """Declare a dataset with the query of the saved files that the tests hold."""
    return declared(name, **({"query": "SELECT * FROM products"} | keys))


def rows_of_generation(generation: int, count: int) -> list[tuple[bytes | None, bytes]]:
    return [(b"%d" % number, b'{"id":%d,"generation":%d}' % (number, generation)) for number in range(count)]


def header_of(rows: Rows, **more: Any) -> Header:
    fields: dict[str, Any] = {
        "dataset": "products",
        "generation": 7,
        "as_of": AS_OF,
        "database_snapshot": "730:735:730,732",
        "rows": rows.count,
        "size_bytes": rows.size_bytes,
        "columns": ("id", "Größe"),
        "fingerprint": fingerprint(saved_dataset()),
    }
    return Header(**fields | more)


def file_of(rows: Rows, **more: Any) -> bytes:
    file = io.BytesIO()
    writer = SnapshotWriter(file, header_of(rows, **more))
    for piece in packed(rows):
        writer.write(piece)
    writer.finish()
    assert writer.size_bytes == len(file.getvalue())
    return file.getvalue()


def table_of(path: Path) -> tuple[Header, Table]:
    """All of a file, or its refusal."""
    header, blocks = read(path)
    unpacker = RowsUnpacker(path.name, header.size_bytes)
    rows = [row for block in blocks for slice_ in unpacker.slices(block) for row in slice_]
    return header, dict(rows)


def noise(count: int, length: int, seed: int = 1) -> Table:
    """Rows that cannot be compressed, so that every byte of their file matters."""
    random_ = random.Random(seed)
    return {b"%d" % number: random_.randbytes(length) for number in range(count)}
