"""Laws of the format of saved files."""

from __future__ import annotations

import base64
import io
import random
import shutil
import tempfile
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base import clock
from cacheservice.base.errors import SnapshotRejected
from cacheservice.sources.disk.format import FORMAT, MAGIC, SnapshotWriter, read
from cacheservice.sources.frames.age import ReadOn
from cacheservice.sources.frames.header import fingerprint
from cacheservice.sources.frames.parts import BLOCK_BYTES
from cacheservice.sources.frames.rows import packed
from tests.kit.datasets import Table, rows_of
from tests.kit.saved_files import AS_OF, file_of, header_of, noise, saved_dataset, table_of

OF_FORMAT_3 = """
Q1NTTkFQAANIAAABEtasTBootS/9ZCgAJQgA1lA9NWBVmwNAguAFLSMFPKT91sLaWge6KWag3uJO4nfkwkKbJCkl22JKd66mwejJ
iokxYKMYHLckLgAvADAA15QZjnT6e8pPO1JMCAkBFCYBUIZvz+rnu3HQnr+VKV8c/7jJrtrm2fdXagagjVMCwunClnXUCDh/A3zs
MJ3j8ErXC8RRBZGjIpOjIpGjJr4x15b6Y1+4v7ICunjnFv59f1j8rXQgfEyOMpBSZcGogs6ttJKsrIWsjGD1INB4OqtW+aLT6nDE
x+JTJxoZFucZKUvKGkuP5IACYfj2vhtyZewx3w0vEgCULNvKk8vV81CZobJnLAy7apgDAESHKtFMIUBz8wzMrrSGUgAAABwRT2vC
KLUv/SQPeQAAkZLEATHECHsiaWQiOjF94ndPolQAAAAgGqy7uyi1L/0kE5kAAIKkcm93cwGqc2l6ZV9ieXRlcwnTYllg
"""
"""Written by the version before `machine` was kept: generation 1 of one row."""


class Folder(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cacheservice-test-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.path = self.directory / "products.000000000007.snapshot"

    def refusal(self, content: bytes) -> str:
        """What is reported for a file with that content, on one line that names it."""
        self.path.write_bytes(content)
        with self.assertRaises(SnapshotRejected) as caught:
            table_of(self.path)
        message = str(caught.exception)
        self.assertEqual(message.splitlines(), [message])
        self.assertIn(self.path.name, message)
        return message


class Format(Folder):
    @settings(deadline=None)
    @given(st.dictionaries(st.binary(max_size=12), st.binary(max_size=300), max_size=100), st.datetimes())
    def test_what_is_written_is_read(self, table: Table, moment: datetime) -> None:
        """Any keys and documents, of any bytes, come back, and the header to the microsecond."""
        rows, as_of = rows_of(table.items()), moment.replace(tzinfo=UTC)
        self.path.write_bytes(file_of(rows, as_of=as_of))
        self.assertEqual(table_of(self.path), (header_of(rows, as_of=as_of), table))

    def test_many_and_large_rows(self) -> None:
        """Rows of many slices and documents of many blocks come back, and no part is larger for it."""
        table = noise(3000, 100) | {b"large": b"x" * (5 * BLOCK_BYTES + 1), b"empty": b"", b"": random.randbytes(10**6)}
        self.path.write_bytes(file_of(rows_of(table.items())))
        self.assertEqual(table_of(self.path)[1], table)
        _, blocks = read(self.path)
        self.assertLessEqual(max(map(len, blocks)), BLOCK_BYTES)

    def test_pieces_are_bounded(self) -> None:
        """No piece holds more than 512 rows, nor more than 128 KiB if it holds more than one."""
        for length in (10, 1000, 300_000):
            for piece in packed(rows_of(noise(1100 if length < 10_000 else 5, length).items())):
                rows = msgpack.unpackb(piece)
                self.assertLessEqual(len(rows), 512)
                self.assertTrue(len(piece) <= 136 * 1024 or len(rows) == 1)

    def test_a_fingerprint_is_of_query_and_key(self) -> None:
        """Another query or key has another fingerprint, wherever one ends and the other begins."""
        different = [
            saved_dataset(),
            saved_dataset(query="SELECT * FROM products "),
            saved_dataset(key=["id", "sku"]),
            saved_dataset(key=["sku", "id"]),
            saved_dataset(key="id:sku"),
            saved_dataset(key='id","sku'),
        ]
        self.assertEqual(len(set(map(fingerprint, different))), len(different))
        self.assertEqual(fingerprint(saved_dataset(interval_s=5.0)), fingerprint(saved_dataset()))

    def test_a_file_of_format_3(self) -> None:
        """A file that a released version wrote is read. Its machine is not known."""
        self.path.write_bytes(base64.b64decode(OF_FORMAT_3))
        header, table = table_of(self.path)
        rows = rows_of([(b"1", b'{"id":1}')])
        read_on = ReadOn(1_767_323_045_000_000, "there", 5_000_000, "")
        self.assertEqual(header, header_of(rows, generation=1, read_on=read_on))
        self.assertEqual(table, {b"1": b'{"id":1}'})
        there, later_s = clock.Host("there", "machine"), 1_767_323_045 + 60.0
        self.assertEqual(header.age(later_s, 7.0, there), (2.0, None))
        uncertain = "it may have been saved on another machine"
        self.assertEqual(header.age(later_s, 86400.0, there._replace(boot="here")), (60.0, uncertain))

    def test_a_header_without_clocks(self) -> None:
        """The age of a file of format 2 is that by the clock of the database, and uncertain."""
        header = header_of(rows_of([]))
        age = header.age(AS_OF.timestamp() + 60.0, 86400.0, clock.Host("here", "machine"))
        self.assertAlmostEqual(age.seconds, 60.0, 3)
        self.assertEqual(age.uncertain, "it was saved by an older version, by the clock of the database alone")


class Damage(Folder):
    def test_every_byte_of_a_small_file(self) -> None:
        """A small file is refused with any one bit of it turned."""
        whole = file_of(rows_of(noise(3, 20).items()))
        for position in range(len(whole)):
            for bit in range(8):
                content = bytearray(whole)
                content[position] ^= 1 << bit
                self.refusal(bytes(content))

    def test_a_thousand_bytes_of_a_large_file(self) -> None:
        """A file of many blocks is refused with any one byte changed."""
        whole = file_of(rows_of(noise(4000, 300).items()))
        random_ = random.Random(2)
        for _ in range(1000):
            content = bytearray(whole)
            content[random_.randrange(len(whole))] ^= random_.randrange(1, 256)
            self.refusal(bytes(content))

    def test_truncation(self) -> None:
        """A file that ends early is refused, wherever it ends; one that is longer as well."""
        whole = file_of(rows_of(noise(4000, 300).items()))
        ends = {*range(0, len(whole), 4096), *range(600), *range(len(whole) - 200, len(whole))}
        for end in sorted(ends):
            self.assertIn("it is truncated", self.refusal(whole[:end]))
        self.assertIn("there is data after its trailer", self.refusal(whole + b"\0"))
        self.assertIn("there is data after its trailer", self.refusal(whole + whole))

    def test_parts_of_another_file(self) -> None:
        """Parts that are whole but of another file, or in another place, are refused."""
        table = noise(2000, 300)
        one, other = (file_of(rows_of(table.items()), generation=generation) for generation in (7, 8))
        first = MAGIC + FORMAT.to_bytes(2, "big")
        header_ends = [
            len(first) + 9 + int.from_bytes(each[len(first) + 1 : len(first) + 5], "big") for each in (one, other)
        ]
        self.assertEqual(one[header_ends[0] : header_ends[0] + 1], b"R")
        self.assertIn("checksum", self.refusal(one[: header_ends[0]] + other[header_ends[1] :]))
        self.assertIn("does not begin", self.refusal(self.sealed((b"T", {"rows": 0, "size_bytes": 0}))))

    def test_lengths_do_not_allocate(self) -> None:
        """What a part, a frame or an array announces is not believed."""
        start = MAGIC + FORMAT.to_bytes(2, "big")
        self.assertIn("no part begins", self.refusal(start + b"H" + b"\xff" * 8))
        bomb = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(100 * BLOCK_BYTES))
        self.assertIn("has no checksum, or announces too much content", self.refusal(self.sealed((b"H", bomb))))
        header = {"dataset": "products", "generation": 7, "as_of_us": 0, "database_snapshot": "", "columns": []}
        header |= {"rows": 1, "size_bytes": 1, "fingerprint": "", "watch_state": "", "probe": ""}
        for rows in (b"\xdd\xff\xff\xff\xff", b"\x91" * 100_000, b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"):
            # One that is too long, or one whose rest never comes.
            self.refusal(self.sealed((b"H", header), (b"R", rows)))

    def test_what_is_no_snapshot(self) -> None:
        """What is well formed but holds something else is refused."""
        good: dict[str, Any] = {"dataset": "p", "generation": 7, "as_of_us": 0, "database_snapshot": "", "columns": []}
        good |= {"rows": 1, "size_bytes": 2, "fingerprint": "", "watch_state": "", "probe": ""}
        for header in (
            {},
            [],
            1,
            good | {"rows": -1},
            good | {"rows": True},
            good | {"columns": [1]},
            good | {"as_of_us": 2**63},
            good | {"more": 1},
        ):
            self.assertIn("header", self.refusal(self.sealed((b"H", header))))
        for rows in (1, [], [[b"k"]], [[b"k", b"v", b"w"]], [[1, b"v"]], [[b"k", None]], [b"kv"], [[[b"k"], b"v"]]):
            content = self.sealed((b"H", good), (b"R", rows), (b"T", {"rows": 1, "size_bytes": 2}))
            if rows == []:
                self.path.write_bytes(content)  # no row at all; the store counts them
                self.assertEqual(table_of(self.path)[1], {})
            else:
                self.assertIn("not rows", self.refusal(content))
        self.assertIn("differ", self.refusal(self.sealed((b"H", good), (b"T", {"rows": 2, "size_bytes": 2}))))
        self.assertIn("two headers", self.refusal(self.sealed((b"H", good), (b"H", good))))
        self.assertIn("not a saved snapshot", self.refusal(b"PK\x03\x04 and more"))
        self.assertIn(
            "format 1 is unknown; this version reads formats 2 to 4",
            self.refusal(MAGIC + (1).to_bytes(2, "big") + b"whatever"),
        )

    def sealed(self, *parts: tuple[bytes, Any]) -> bytes:
        """A file of those parts with all its checksums right. Bytes for a header are a frame, for rows their stream."""
        file = io.BytesIO()
        writer = SnapshotWriter(file, header_of(rows_of([])))
        file.seek(8)
        file.truncate()
        crc = zlib.crc32(file.getvalue())
        for kind, content in parts:
            stream = content if isinstance(content, bytes) else msgpack.packb(content)
            compress = zstandard.ZstdCompressor(write_checksum=True).compress
            kept = content if kind == b"H" and isinstance(content, bytes) else compress(stream)
            crc = zlib.crc32(kind + len(kept).to_bytes(4, "big") + kept, crc)
            file.write(kind + len(kept).to_bytes(4, "big") + crc.to_bytes(4, "big") + kept)
        del writer
        return file.getvalue()
