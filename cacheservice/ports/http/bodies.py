"""Whole datasets as bodies, piece by piece from one snapshot, plain or compressed.

JSON is one object, ``{key: document}``, a row a line. NDJSON has a line a row as well, each an object of its own:
``{"key": …, "value": document}``, because a document need not hold its key. Documents are sent as PostgreSQL
rendered them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from json.encoder import encode_basestring
from typing import Any
from weakref import ref

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from cacheservice.cache.dataset import Dataset, Snapshot
from cacheservice.cache.events import Ended, Published
from cacheservice.cache.rows import STARTS, Rows, unframed

PIECE_BYTES = 64 * 1024
"""What a transport buffers before it asks to pause; made in a third of a millisecond."""
_BETWEEN = b",\n"
_PIECE_ROWS = 512
"""What goes into one piece if it is not too large."""
_AS_IT_IS = re.compile(rb"[ !#-\[\]-~]*").fullmatch
"""ASCII that JSON wants no escape for (RFC 8259, 7): most keys, and found out of hundreds at once."""
_GZIP = 31
"""zlib's number for: the largest window, with gzip's header, in which no time is written."""

Keys = list[bytes]
Bulks = list[bytes]
"""Documents as bulk strings."""
Text = tuple[bytes, bytes]
Piece = bytes | Deferred[None]
"""Of a body: the next bytes, or what to wait for before they can be asked for again."""


def json_object(rows: Rows) -> Iterator[bytes]:
    """All rows as one JSON object, in pieces of about 64 KiB."""
    if not rows.count:
        yield b"{}\n"
        return
    texts = _texts(rows, _members, _member_head)
    # Each begins with what separates it from the one before.
    first, document = next(texts)
    yield b"{" + first.removeprefix(_BETWEEN)
    yield from cut(document)
    for head, document in texts:
        yield head
        yield from cut(document)
    yield b"}\n"


def json_lines(rows: Rows) -> Iterator[bytes]:
    """All rows as NDJSON, in pieces of about 64 KiB."""
    for head, document in _texts(rows, _lines, _line_head):
        yield head
        if document:
            yield from cut(_on_one_line(document))
            yield b"}\n"


def cut(document: bytes) -> Iterator[bytes]:
    """A large document in pieces of at most 64 KiB."""
    for start in range(0, len(document), PIECE_BYTES):
        yield document[start : start + PIECE_BYTES]


def _texts(rows: Rows, join: Callable[[Keys, Bulks], bytes], head: Callable[[bytes], bytes]) -> Iterator[Text]:
    """The text of some rows and nothing; or, of one that is large, the text before its document and the document."""
    for keys, documents in rows.slices(_PIECE_ROWS):
        yield from _parts(keys, documents, join, head)


def _parts(
    keys: Keys, documents: Bulks, join: Callable[[Keys, Bulks], bytes], head: Callable[[bytes], bytes]
) -> Iterator[Text]:
    """The rows of one slice, in parts of about 64 KiB if they are more."""
    if sum(map(len, documents)) <= 2 * PIECE_BYTES:
        yield join(keys, documents), b""
    elif len(keys) == 1:
        yield head(keys[0]), unframed(documents[0])
    else:
        middle = len(keys) // 2
        yield from _parts(keys[:middle], documents[:middle], join, head)
        yield from _parts(keys[middle:], documents[middle:], join, head)


def _strings(keys: Keys) -> Keys:
    """The keys as JSON strings, but for the quotes. A database in SQL_ASCII may hold what is no UTF-8."""
    if _AS_IT_IS(b"".join(keys)):
        return keys
    return [encode_basestring(key.decode("utf-8", "replace")).encode()[1:-1] for key in keys]


def _members(keys: Keys, documents: Bulks) -> bytes:
    start = STARTS.get
    # `unframed` written out: a third of the time.
    return b"".join(
        [
            b',\n"%b":%b' % (key, ready[start(len(ready)) or ready.index(b"\n") + 1 : -2])
            for key, ready in zip(_strings(keys), documents, strict=True)
        ]
    )


def _member_head(key: bytes) -> bytes:
    return b'%b"%b":' % (_BETWEEN, _strings([key])[0])


def _lines(keys: Keys, documents: Bulks) -> bytes:
    rows = zip(_strings(keys), documents, strict=True)
    return b"".join([b'{"key":"%b","value":%b}\n' % (key, _on_one_line(unframed(ready))) for key, ready in rows])


def _line_head(key: bytes) -> bytes:
    return b'{"key":"%b","value":' % _strings([key])[0]


def _on_one_line(document: bytes) -> bytes:
    """A column of type json keeps the line ends between its tokens; within a string JSON has none (RFC 8259, 7)."""
    if b"\n" in document or b"\r" in document:
        return document.replace(b"\n", b" ").replace(b"\r", b" ")
    return document


class GzipBody:
    """A compressed body, growing while it is made; any number of clients follow it."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._waiting: list[Deferred[None]] = []
        self._failed = False
        self.size_bytes: int | None = None
        """None until it is complete."""

    def follow(self) -> Iterator[Piece]:
        """Its pieces from the first one, and what to wait for where the next is not made yet.

        :raises RuntimeError: if it will never be complete.
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
    """The bodies of one generation by their kind: NDJSON or not."""

    def __init__(self, generation: int, unsubscribe: Callable[[], None]) -> None:
        self.generation = generation
        self.unsubscribe = unsubscribe
        self.bodies: dict[bool, GzipBody] = {}


class GzipBodies:
    """Compressed bodies, each made once for a generation, in a thread, and kept until the next one.

    An older one lives on with the clients that follow it; with the last of them its making ends as well.

    :param reactor: `IReactorThreads`; zlib works there without the interpreter's lock.
    """

    _log = Logger()

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._kept: dict[str, _Kept] = {}
        self.made = 0

    def find(self, dataset: Dataset, snapshot: Snapshot, lines: bool) -> GzipBody | None:
        """The body if there is one already, complete or not."""
        kept = self._kept.get(dataset.name)
        return kept.bodies.get(lines) if kept is not None and kept.generation == snapshot.generation else None

    def make(self, dataset: Dataset, snapshot: Snapshot, lines: bool) -> GzipBody:
        """The body, which is begun now if there is none."""
        body = self.find(dataset, snapshot, lines)
        if body is None:
            body = GzipBody()
            self.made += 1
            if dataset.name not in self._kept:
                unsubscribe = dataset.subscribe(lambda event: self._forget(event.dataset), Published, Ended)
                self._kept[dataset.name] = _Kept(snapshot.generation, unsubscribe)
            self._kept[dataset.name].bodies[lines] = body
            pieces = json_lines(snapshot.rows) if lines else json_object(snapshot.rows)
            # It ends by itself, logs its failure and is never waited for: the body tells how far it is.
            Deferred.fromCoroutine(self._compress(pieces, ref(body)))
        return body

    def forget(self) -> None:
        """Drop all bodies; what nobody follows is not finished."""
        for name in list(self._kept):
            self._forget(name)

    def _forget(self, name: str) -> None:
        if (kept := self._kept.pop(name, None)) is not None:
            kept.unsubscribe()

    async def _compress(self, pieces: Iterable[bytes], alive: ref[GzipBody]) -> None:
        # Between the pieces only those who want the body hold it.
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

    async def compress(self, document: bytes) -> bytes:
        """One document, compressed in a thread."""
        return await self._in_thread(compress_now, document)

    def _in_thread(self, work: Callable[..., bytes], *data: bytes) -> Deferred[bytes]:
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work, *data)


def compress_now(document: bytes) -> bytes:
    """One document, compressed here and now."""
    return zlib.compress(document, wbits=_GZIP)
