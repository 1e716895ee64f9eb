"""One request and its response: asks for the reply, frames it and sends it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from twisted.logger import Logger
from twisted.python.failure import Failure

from cacheservice.ports.held import Streamed
from cacheservice.ports.http.bodies import Piece
from cacheservice.ports.http.messages import Later, Reply
from cacheservice.ports.http.problem import Problem
from cacheservice.ports.http.request_head import Head
from cacheservice.ports.http.routes import Routes, is_probe

CLOSE = b"Connection: close\r\n"
LAST_CHUNK = b"0\r\n\r\n"


class Client(Protocol):
    """The connection of an exchange."""

    is_admitted: bool

    def host(self) -> str:
        """Return the IP address of the client; empty if it has none."""

    def too_many(self) -> str:
        """Return the reason of a refusal because of the limit of connections."""

    def note_refusal(self) -> None:
        """Count and log that this client was refused because there are too many."""

    def send(self, data: bytes, /) -> None:
        """Send bytes."""

    def stream(self, pieces: Iterator[Piece], /) -> None:
        """Send pieces as they become ready and the client reads them."""


class Exchange:
    """One request and its response; the `Request` of the handlers.

    `persistent` is whether the connection continues after it. `ends_with_input` is whether a client that has closed its
    side is considered gone: it is true while the reply waits for an event, and for an endless reply.
    """

    __slots__ = ("_client", "_is_1_0", "ends_with_input", "headers", "is_chunked", "method", "persistent", "target")
    _log = Logger()

    def __init__(self, client: Client, head: Head) -> None:
        self._client = client
        self._is_1_0 = head.is_1_0
        self.method = head.method
        self.target = head.target
        self.headers = head.headers
        self.persistent = head.persistent and client.is_admitted
        self.ends_with_input = False
        self.is_chunked = False

    def host(self) -> str:
        return self._client.host()

    def wait(self, *, for_an_event: bool) -> None:
        """Note that the reply comes later.

        :param for_an_event: whether it waits for an event, so that a client that has closed its side is gone.
        """
        self.ends_with_input = for_an_event

    def reply(self, routes: Routes) -> Reply | Later:
        """Return the reply, now or later; a refusal is a reply as well."""
        try:
            if not self._client.is_admitted and not is_probe(self):
                raise Problem(503, self._client.too_many(), b"Retry-After: 1\r\n")
            return routes.answer(self)
        except Exception as error:
            return self.refusal(routes, error)

    def refusal(self, routes: Routes, error: BaseException) -> Reply:
        """Return the reply for an exception; log it if it is a bug."""
        if not isinstance(error, Problem):
            self._log.failure("an HTTP request could not be answered", Failure(error))
            error = Problem(500, "an internal error; its traceback is in the log")
        elif error.status == 503 and not self._client.is_admitted:
            self._client.note_refusal()
        return routes.refusal(error, self.target)

    def send(self, reply: Reply) -> None:
        """Send a reply, or its head and the beginning of its pieces."""
        head, body, size_bytes, endless = reply
        if endless:
            self.persistent = False
        self.ends_with_input = endless
        if not self.persistent:
            head += CLOSE
        with_body = self.method != b"HEAD"
        if isinstance(body, bytes):
            self._client.send(b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body if with_body else b""))
        elif body is None:
            self._client.send(head + b"\r\n")
        else:
            self.is_chunked = size_bytes is None and not self._is_1_0
            if self.is_chunked:
                head += b"Transfer-Encoding: chunked\r\n"
            elif size_bytes is not None:
                head += b"Content-Length: %d\r\n" % size_bytes
            self._client.send(head + b"\r\n")
            if with_body:
                self._client.stream(chunked(body) if self.is_chunked else body)


def send_last(client: Client, reply: Reply, *, with_body: bool) -> None:
    """Send a refusal that is not the reply to a valid request."""
    assert isinstance(reply.body, bytes), "a refusal is short"
    body = reply.body
    client.send(b"%b%bContent-Length: %d\r\n\r\n%b" % (reply.head, CLOSE, len(body), body if with_body else b""))


def chunked(body: Iterator[Piece]) -> Iterator[Piece]:
    """Return a body in the chunked coding (RFC 9112, 7.1), each chunk in one piece.

    An empty piece, which marks work without output, is not a chunk: that would end the body.
    """
    pieces = _chunks(body)
    return Streamed(pieces, body.snapshots) if isinstance(body, Streamed) else pieces


def _chunks(body: Iterator[Piece]) -> Iterator[Piece]:
    for piece in body:
        if isinstance(piece, bytes) and piece:
            # In one piece, so that a turn, and a body that is ended early, end after a whole chunk.
            yield b"%x\r\n%b\r\n" % (len(piece), piece)
        else:
            yield piece
    yield LAST_CHUNK
