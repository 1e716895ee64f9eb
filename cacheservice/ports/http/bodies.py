"""Renders whole datasets as bodies, plain or compressed.

A body is in pieces from one snapshot. JSON is one object, ``{key: document}``, with one row per line. NDJSON, too, has
one row per line, each an object: ``{"key": …, "value": document}``, because a document need not contain its key.
Documents are sent as PostgreSQL rendered them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from json.encoder import encode_basestring
from weakref import ref

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from cacheservice.base.interfaces import Reactor
from cacheservice.base.threads import in_thread
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.events import Ended, Published
from cacheservice.cache.framing import STARTS, unframed
from cacheservice.cache.rows import Rows
from cacheservice.cache.snapshot import Snapshot

PIECE_BYTES = 64 * 1024
"""A transport asks its producer to pause when this much is buffered. A piece takes a third of a millisecond."""
_BETWEEN = b",\n"
SLICE_ROWS = 512
"""The rows of one piece, unless they are too large."""
_AS_IT_IS = re.compile(rb"[ !#-\[\]-~]*").fullmatch
"""ASCII that needs no escape in JSON (RFC 8259, 7). Most keys match, and hundreds are checked in one call."""
_GZIP = 31
"""zlib's wbits for the largest window with a gzip header. Its header contains no time."""
_ENDLESS_GZIP, _ENDLESS_MEMORY = 28, 5
"""A window of 4 KiB, so that the state of each endless body takes 32 KiB of memory instead of 256."""
_HERE_BYTES = 16 * 1024
"""Compressed on the reactor's thread in 0.2 ms; larger pieces of an endless body are compressed on another thread."""

Keys = list[bytes]
Bulks = list[bytes]
"""Documents as bulk strings."""
Text = tuple[bytes, bytes]
Piece = bytes | Deferred[None]
"""An item of a body: the next bytes, or a Deferred that fires when the next item is available."""


def json_object(rows: Rows) -> Iterator[bytes]:
    """Yield all rows as one JSON object, in pieces of about 64 KiB."""
    if not rows.count:
        yield b"{}\n"
        return
    texts = row_texts(rows.slices(SLICE_ROWS), _members, _member_head)
    # Each text starts with the separator from the previous one.
    first, document = next(texts)
    yield b"{" + first.removeprefix(_BETWEEN)
    yield from cut(document)
    for head, document in texts:
        yield head
        yield from cut(document)
    yield b"}\n"


def json_lines(rows: Rows) -> Iterator[bytes]:
    """Yield all rows as NDJSON, in pieces of about 64 KiB."""
    for head, document in row_texts(rows.slices(SLICE_ROWS), _lines, _line_head):
        yield head
        if document:
            yield from cut(on_one_line(document))
            yield b"}\n"


def cut(document: bytes) -> Iterator[bytes]:
    """Yield a large document in pieces of at most 64 KiB."""
    for start in range(0, len(document), PIECE_BYTES):
        yield document[start : start + PIECE_BYTES]


def row_texts(
    slices: Iterable[tuple[Keys, Bulks]], join: Callable[[Keys, Bulks], bytes], head: Callable[[bytes], bytes]
) -> Iterator[Text]:
    """Yield texts, each with a document or with empty bytes.

    Several rows are one text with empty bytes. A large row is the text before its document, and the document.

    :param slices: keys and documents of at most `SLICE_ROWS` rows.
    """
    for keys, documents in slices:
        yield from _parts(keys, documents, join, head)


def _parts(
    keys: Keys, documents: Bulks, join: Callable[[Keys, Bulks], bytes], head: Callable[[bytes], bytes]
) -> Iterator[Text]:
    """Yield the rows of one slice, split into parts of about 64 KiB."""
    if sum(map(len, documents)) + sum(map(len, keys)) <= 2 * PIECE_BYTES:
        yield join(keys, documents), b""
    elif len(keys) == 1:
        yield head(keys[0]), unframed(documents[0])
    else:
        middle = len(keys) // 2
        yield from _parts(keys[:middle], documents[:middle], join, head)
        yield from _parts(keys[middle:], documents[middle:], join, head)


def json_strings(keys: Keys) -> Keys:
    """Return the keys as JSON strings without quotes.

    A database with the encoding SQL_ASCII may contain bytes that are not UTF-8.
    """
    if _AS_IT_IS(b"".join(keys)):
        return keys
    return [encode_basestring(key.decode("utf-8", "replace")).encode()[1:-1] for key in keys]


def _members(keys: Keys, documents: Bulks) -> bytes:
    start = STARTS.get
    # `unframed`, inlined: a third of the time.
    return b"".join(
        [
            b',\n"%b":%b' % (key, ready[start(len(ready)) or ready.index(b"\n") + 1 : -2])
            for key, ready in zip(json_strings(keys), documents, strict=True)
        ]
    )


def _member_head(key: bytes) -> bytes:
    return b'%b"%b":' % (_BETWEEN, json_strings([key])[0])


def _lines(keys: Keys, documents: Bulks) -> bytes:
    rows = zip(json_strings(keys), documents, strict=True)
    return b"".join([b'{"key":"%b","value":%b}\n' % (key, on_one_line(unframed(ready))) for key, ready in rows])


def _line_head(key: bytes) -> bytes:
    return b'{"key":"%b","value":' % json_strings([key])[0]


def on_one_line(document: bytes) -> bytes:
    """Replace line breaks between the tokens of a document by spaces.

    A column of type json keeps them. JSON strings contain no line breaks (RFC 8259, 7).
    """
    if b"\n" in document or b"\r" in document:
        return document.replace(b"\n", b" ").replace(b"\r", b" ")
    return document


class GzipBody:
    """A compressed body that grows while it is compressed.

    Any number of clients can follow it.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._waiting: list[Deferred[None]] = []
        self._failed = False
        self.size_bytes: int | None = None
        """The total size; None until the body is complete."""

    def follow(self) -> Iterator[Piece]:
        """Yield the pieces from the first one on, and Deferreds for missing pieces.

        :raises RuntimeError: if the compression failed.
        """
        position = 0
        while True:
            if position < len(self._pieces):
                yield self._pieces[position]
                position += 1
            elif self._failed:
                raise RuntimeError("the body could not be compressed; the reason was logged before")
            elif self.size_bytes is not None:
                return
            else:
                waiting: Deferred[None] = Deferred()
                self._waiting.append(waiting)
                yield waiting

    def add(self, piece: bytes) -> None:
        if piece:
            self._pieces.append(piece)
            self._wake()

    def complete(self) -> None:
        self.size_bytes = sum(map(len, self._pieces))
        self._wake()

    def fail(self) -> None:
        self._failed = True
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.callback(None)


class _Kept:
    """The compressed bodies of one generation, by format: True for NDJSON."""

    def __init__(self, generation: int, unsubscribe: Callable[[], None]) -> None:
        self.generation = generation
        self.unsubscribe = unsubscribe
        self.bodies: dict[bool, GzipBody] = {}


class GzipBodies:
    """Compresses each body once per generation.

    This happens in a thread, and the body is kept until the next generation. A superseded body lives as long as clients
    follow it. After the last of them its compression stops.

    :param reactor: `IReactorThreads`; in its threads zlib works without the interpreter's lock.
    """

    _log = Logger()

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._kept: dict[str, _Kept] = {}
        self.made = 0

    def find(self, dataset: Dataset, snapshot: Snapshot, lines: bool) -> GzipBody | None:
        """Return the body if it exists, complete or not."""
        kept = self._kept.get(dataset.name)
        return kept.bodies.get(lines) if kept is not None and kept.generation == snapshot.generation else None

    def make(self, dataset: Dataset, snapshot: Snapshot, lines: bool) -> GzipBody:
        """Return the body; start to compress it if it does not exist."""
        body = self.find(dataset, snapshot, lines)
        if body is None:
            body = GzipBody()
            self.made += 1
            if dataset.name not in self._kept:
                unsubscribe = dataset.subscribe(lambda event: self._forget(event.dataset), Published, Ended)
                self._kept[dataset.name] = _Kept(snapshot.generation, unsubscribe)
            self._kept[dataset.name].bodies[lines] = body
            pieces = json_lines(snapshot.rows) if lines else json_object(snapshot.rows)
            # The coroutine logs its own failure, and the body records its progress, so no caller waits for it.
            Deferred.fromCoroutine(self._compress(pieces, ref(body)))
        return body

    def forget(self) -> None:
        """Drop all bodies; a body without followers is not finished."""
        for name in list(self._kept):
            self._forget(name)

    def _forget(self, name: str) -> None:
        if (kept := self._kept.pop(name, None)) is not None:
            kept.unsubscribe()

    async def _compress(self, pieces: Iterable[bytes], alive: ref[GzipBody]) -> None:
        # Between pieces only its followers hold a reference to the body.
        compressor = zlib.compressobj(wbits=_GZIP)
        try:
            for piece in pieces:
                compressed = await self._in_thread(compressor.compress, piece)
                if (body := alive()) is None:
                    return
                body.add(compressed)
                del body
            last = await self._in_thread(compressor.flush)
            if (body := alive()) is not None:
                body.add(last)
                body.complete()
        except Exception:
            self._log.failure("a dataset could not be compressed")
            if (body := alive()) is not None:
                body.fail()

    def flushed(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Compress an endless body for one client, flushed after each piece."""
        compressor = zlib.compressobj(wbits=_ENDLESS_GZIP, memLevel=_ENDLESS_MEMORY)

        def compressed(piece: bytes) -> bytes:
            return compressor.compress(piece) + compressor.flush(zlib.Z_SYNC_FLUSH)

        for piece in pieces:
            if not isinstance(piece, bytes) or not piece:
                yield piece
            elif len(piece) <= _HERE_BYTES:
                yield compressed(piece)
            else:
                done: list[bytes] = []
                yield self._in_thread(compressed, piece).addCallback(done.append)
                yield done[0]
        yield compressor.flush()

    async def compress(self, document: bytes) -> bytes:
        """Compress one document in a thread."""
        return await self._in_thread(compress_now, document)

    def _in_thread(self, work: Callable[..., bytes], *data: bytes) -> Deferred[bytes]:
        return in_thread(self._reactor, work, *data)


def compress_now(document: bytes) -> bytes:
    """Compress one document in the calling thread."""
    return zlib.compress(document, wbits=_GZIP)
