"""The HTTP port's connections: `twisted.web`'s channel, made stricter, bounded, and quick.

`HTTPChannel` gives lines, request lines, folded headers, and one request after the other however they were sent.
Its `Request` is not used: a read has no body, no form and no cookie, and an answer is one write. Beyond what
twisted.web refuses (RFC 9112 by section):

- 3.2: a request without exactly one valid Host is refused.
- 6: a body is refused before it is read; two lengths, or a length that is none, as well.
- The head has one deadline, from its first byte to its last: twisted.web's own starts again with each byte.
- What a client does not read stays bounded: nothing more is answered, or even read, while it is choked, and it is
  dropped if it takes less than what is buffered in an idle timeout. (twisted.web goes on to read requests meanwhile.)
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any

from twisted.internet import tcp
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer
from twisted.internet.protocol import ServerFactory, connectionDone
from twisted.internet.task import CooperativeTask, Cooperator, TaskFinished, TaskStopped
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.iweb import INonQueuedRequestFactory
from zope.interface import implementer, provider

from cacheservice.cache.cache import Cache, Refreshes
from cacheservice.ports import rejected
from cacheservice.ports.admission import RESERVE_S, Door, open_door
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.held import HeldSnapshots, Hold, Streamed, Unlimited
from cacheservice.ports.http import assets
from cacheservice.ports.http.answers import Answers, Exposition, Reply, Request, is_probe
from cacheservice.ports.http.bodies import GzipBodies, Piece
from cacheservice.ports.http.digests import Digests
from cacheservice.ports.http.events import Feed
from cacheservice.ports.http.guard import Guard
from cacheservice.ports.http.problem import Problem
from cacheservice.ports.rotation import Look, no_files

HEAD_TIMEOUT_S = 10.0
MAX_HEADERS = 100
MAX_HEAD_BYTES = 16 * 1024

_LINGER_S = 2.0
"""How long a client may take to close after our last word. Closing first, with input of it
unread, would send a reset that overtakes the answer (RFC 9112, 9.6)."""
_PIPELINE_TURN_S = 0.001
"""How long the pipelined requests of one client may hold the reactor."""
_STREAMS_TURN_S = 0.001
"""How long all streams together may; with what the last of them began it is two milliseconds."""

_REASONS: Mapping[int, rejected.Reason] = MappingProxyType({408: "slow_client"})
"""Why a connection is refused, by the status that it is told; by any other, for what it sent."""
_CLOSE = b"Connection: close\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_TLS, _TLS_HANDSHAKE = b"\x16", b"\x16\x03"
"""How a TLS record with a ClientHello begins (RFC 8446, 5.1)."""
_BARE_LF = re.compile(rb"(?<!\r)\n")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t -~\x80-\xff]*)")
_HOST = re.compile(rb"(?:[0-9A-Za-z\-._~%!$&'()*+,;=]*|\[[0-9A-Fa-f:.]+\]|\[v[0-9A-Fa-f]+\.[^\]@/?#]+\])(?::[0-9]*)?")
_ALONE = (b"host", b"content-length", b"transfer-encoding", b"authorization", b"if-modified-since")
"""Headers that are no lists: given twice they contradict themselves (RFC 9110, 5.3)."""


@provider(INonQueuedRequestFactory)
class HttpRequest(Request):
    """A request on its channel, as `HTTPChannel` fills and knows it."""

    __slots__ = ("channel", "chunks")

    def __init__(self, channel: HttpChannel) -> None:
        super().__init__(b"", b"", {})
        self.channel = channel
        self.chunks = True

    def host(self) -> str:
        address = self.channel.transport.getPeer()
        return address.host if isinstance(address, IPv4Address | IPv6Address) else ""

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        self.method = command
        self.target = path
        self.chunks = version == b"HTTP/1.1"
        self.channel.answer(self)

    def connectionLost(self, reason: Failure) -> None:
        """The channel ends what it does for the request."""


@implementer(IPushProducer)
class _Stream:
    """What is left of a body; it goes on in turns with the other streams while the transport takes it."""

    def __init__(
        self, task: CooperativeTask[Any], pieces: Generator[Any, None, None], chunked: bool, endless: bool
    ) -> None:
        self.chunked = chunked
        self.endless = endless
        self._task = task
        self._pieces = pieces
        self._paused = False

    def pauseProducing(self) -> None:
        if not self._paused:
            self._paused = True
            self._task.pause()

    def resumeProducing(self) -> None:
        if self._paused:
            self._paused = False
            self._task.resume()

    def stopProducing(self) -> None:
        with suppress(TaskFinished):
            self._task.stop()
        self._pieces.close()  # whoever makes the body may have to know, and what the task waits for may come late


@implementer(IHalfCloseableProtocol)
class HttpChannel(HTTPChannel):
    """One client."""

    requestFactory = HttpRequest  # type: ignore[assignment]  # it has what HTTPChannel calls, and no more
    totalHeadersSize = MAX_HEAD_BYTES
    requests: list[HttpRequest]
    transport: Any
    _dataBuffer: list[bytes]
    _networkProducer: Any
    _log = Logger()

    # Class attributes until they change: ten thousand idle clients pay for each of their own.
    _command = b""
    _deadline_at: float | None = None
    _timer: Any = None
    _yielding: Any = None
    _waiting: Deferred[None] | None = None
    _is_made = False
    _stream: _Stream | None = None
    _hold: Hold | None = None
    _direct = _may_be_direct = False
    _in_head = False
    _in_reserve = False
    _finishing = False
    _read_closed = False
    _answered_while_choked = False
    _turn_ends_at = 0.0
    _header_count = 0

    def __init__(self, factory: HttpFactory) -> None:
        super().__init__()
        self.factory: HttpFactory = factory

    def connectionMade(self) -> None:
        super().connectionMade()
        self._direct = self._may_be_direct = isinstance(self.transport, tcp.Server)  # TLS would be another's
        factory = self.factory
        factory.clients.add(self)
        self._in_reserve = not factory.door.admit(self, factory.max_connections)
        self._limit(self._patience_s)

    @property
    def _patience_s(self) -> float:
        """How long the client may be silent, or take nothing of an answer."""
        return RESERVE_S if self._in_reserve else self.factory.idle_timeout_s

    def turn_away(self) -> None:
        """Another connection past the limit needs the place."""
        if self._finishing or self._handlingRequest:
            self.transport.abortConnection()
        else:
            self._refuse(503, self._too_many())

    def _too_many(self) -> str:
        return f"too many connections, the limit is {self.factory.max_connections}"

    # From bytes to a request

    def dataReceived(self, data: bytes) -> None:
        if self._finishing:
            return
        self._turn_ends_at = time.perf_counter() + _PIPELINE_TURN_S
        # Two counts cost nothing beside the rest. A body, of which nothing is read, may hold what it likes.
        if data.count(b"\n") != data.count(b"\r\n") or data[:1] == _TLS:
            self._check_lines(data)
            if self._finishing:
                return
        super().dataReceived(data)
        if self._handlingRequest or self._finishing:
            return
        if self._read_closed:
            self._finish()  # the rest of this head will never come
        elif not self._in_head and (self._buffer or self.requests):
            self._in_head = True
            self._limit(RESERVE_S if self._in_reserve else self.factory.head_timeout_s)

    def _check_lines(self, data: bytes) -> None:
        """Refuse at once what would wait for an end that never comes: TLS, and lines that end in LF alone."""
        if self._handlingRequest:
            return
        before = b"".join(self._dataBuffer) + self._buffer if self._in_head else b""
        if not before and data[:2] == _TLS_HANDSHAKE:
            self._refuse(400, "this port speaks HTTP without TLS: ask for http:// here, or put a proxy in front")
            return
        text = before + data
        is_end = self._in_head and text.startswith(b"\r\n")  # the lines before are gone from the buffer
        if not is_end and _BARE_LF.search(text.partition(b"\r\n\r\n")[0]):
            self._refuse(400, "a line ends in LF alone; HTTP's lines end in CR LF")

    def lineReceived(self, line: bytes) -> None:
        if not self._finishing:
            super().lineReceived(line)

    def lineLengthExceeded(self, line: bytes) -> None:
        self._refuse_long_head()

    def _respondToBadRequestAndDisconnect(self) -> None:
        """HTTPChannel's own refusals, of a request line that is none and of a head that is too long."""
        if self._receivedHeaderSize > self.totalHeadersSize:
            self._refuse_long_head()
        else:
            self._refuse(400, "the request line is malformed, or of a version other than HTTP/1.0 and HTTP/1.1")

    def _refuse_long_head(self) -> None:
        if self.requests:
            self._refuse(431, f"the head is longer than {MAX_HEAD_BYTES} bytes")
        else:
            self._refuse(414, f"the request line is longer than {MAX_HEAD_BYTES} bytes")

    def headerReceived(self, line: bytes) -> bool:
        """Take one header, unfolded; False if it was refused."""
        if self._finishing:
            return False
        parts = _HEADER.fullmatch(line)
        if parts is None:
            self._refuse(400, "a header line is malformed")
            return False
        self._header_count += 1
        if self._header_count > MAX_HEADERS:
            self._refuse(431, f"there are more than {MAX_HEADERS} headers")
            return False
        name, value = parts.groups()
        name = name.lower()
        value = value.strip(b" \t")
        headers = self.requests[-1].headers
        if name in headers:
            if name in _ALONE:
                self._refuse(400, f"there is more than one {name.decode().title()} header")
                return False
            value = headers[name] + b", " + value
        headers[name] = value
        return True

    def allHeadersReceived(self) -> None:
        """Decide how the connection goes on, before anything that follows the head is looked at."""
        headers = self.requests[-1].headers
        self._header_count = 0
        self.length: int | None = 0
        self.persistent = self._version == b"HTTP/1.1"
        self._check_host(headers.get(b"host"))
        if self.persistent and b"connection" in headers:
            options = [option.strip(b" \t") for option in headers[b"connection"].lower().split(b",")]
            self.persistent = b"close" not in options
        if b"content-length" in headers or b"transfer-encoding" in headers:
            self._check_body(headers)
        if b"expect" in headers and headers[b"expect"].lower() != b"100-continue":
            self._refuse(417, "the one expectation that is known is 100-continue")
        if self._in_reserve:
            self.persistent = False
        if self._finishing:
            self.length = None  # to HTTPChannel: do not go on to the answer

    def _check_host(self, host: bytes | None) -> None:
        if host is None:
            if self._version == b"HTTP/1.1":
                self._refuse(400, "there is no Host header")
        elif not _HOST.fullmatch(host):
            self._refuse(400, "the Host header is malformed")

    def _check_body(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length")
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (length is not None or self._version != b"HTTP/1.1"):
            self._refuse(400, "Transfer-Encoding contradicts the rest of the head")
        elif coding is not None and coding.lower() != b"chunked":
            self._refuse(501, "the one transfer coding that is known is chunked")
        elif length is not None and not length.isdigit():
            self._refuse(400, "Content-Length is no number")
        elif coding is not None or (length and length.strip(b"0")):
            # A body follows that nobody reads, so the connection ends with the answer.
            self.persistent = False
            if self._command in (b"GET", b"HEAD"):
                self._refuse(413, "a read takes no request body")

    # From a request to its answer

    def answer(self, request: HttpRequest) -> None:
        """Answer a request, now or later. The next one is not looked at before."""
        self._in_head = False
        try:
            if self._in_reserve and not is_probe(request):
                raise Problem(503, self._too_many(), b"Retry-After: 1\r\n")
            reply = self.factory.answers.answer(request)
        except Exception as error:
            reply = Reply(*self._refusal(error, request))
        if isinstance(reply, Reply):
            self._send(request, reply)
            return
        self._deadline_at = None
        self._is_made = isinstance(reply, Deferred)
        waiting = Deferred.fromCoroutine(self._answer_later(request, reply))
        if not waiting.called:
            self._waiting = waiting

    async def _answer_later(self, request: HttpRequest, coming: Awaitable[Reply]) -> None:
        try:
            reply = await coming
        except CancelledError:
            return  # the client is gone
        except Exception as error:
            reply = Reply(*self._refusal(error, request))
        self._waiting = None
        self._send(request, reply)

    def _refusal(self, error: Exception, request: HttpRequest) -> tuple[bytes, bytes]:
        if not isinstance(error, Problem):
            self._log.failure("an HTTP request could not be answered", Failure(error))
            error = Problem(500, "an internal error; its traceback is in the log")
        elif self._in_reserve and error.status == 503:
            self._note_refusal()
        return self.factory.answers.problem(error, request.target)

    def _send(self, request: HttpRequest, reply: Reply) -> None:
        head, body, size_bytes, endless = reply
        with_body = request.method != b"HEAD"
        if endless:
            self.persistent = False
        if not self.persistent:
            head += _CLOSE
        if isinstance(body, bytes):
            self._write(head, body, with_body)
        elif body is None:
            self._put(head + b"\r\n")
        else:
            chunked = size_bytes is None and request.chunks
            if chunked:
                head += b"Transfer-Encoding: chunked\r\n"
            elif size_bytes is not None:
                head += b"Content-Length: %d\r\n" % size_bytes
            self._put(head + b"\r\n")
            if with_body:
                self._send_pieces(body, chunked, endless)
                return
        self._sent()

    def _write(self, head: bytes, body: bytes, with_body: bool) -> None:
        self._put(b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body if with_body else b""))

    def _put(self, *parts: bytes) -> None:
        """Write, straight to the socket as long as the transport has nothing queued for this client.

        `transport.write` asks for writability and waits a turn of the reactor: without it a third more requests/s
        (measured).
        """
        if self._direct:
            try:
                sent: int = self.transport.socket.sendmsg(parts)
            except OSError:
                sent = 0  # full, or lost, which the transport will notice
            if sent == sum(map(len, parts)):
                return
            self._direct = False
            self.transport.write(b"".join(parts)[sent:])
        else:
            self.transport.writeSequence(parts)

    def _send_pieces(self, body: Iterator[Piece], chunked: bool, endless: bool) -> None:
        self._deadline_at = None
        if isinstance(body, Streamed):
            self._hold = self.factory.held.begin(self, body.snapshots)
        pieces = self._pieces_written(body, chunked)
        task = self.factory.streams.cooperate(pieces)
        self._stream = _Stream(task, pieces, chunked, endless)
        self.registerProducer(self._stream, True)
        if self._waitingForTransport:
            self._stream.pauseProducing()
        task.whenDone().addCallbacks(self._streamed, self._not_streamed).addErrback(self._lost)

    def _pieces_written(self, body: Iterator[Piece], chunked: bool) -> Generator[Deferred[None] | None, None, None]:
        for piece in body:
            if isinstance(piece, Deferred):
                yield piece
            else:
                if chunked:
                    self._put(b"%x\r\n" % len(piece), piece, b"\r\n")
                else:
                    self._put(piece)
                yield None
        if chunked:
            self._put(_LAST_CHUNK)

    def _streamed(self, _: object) -> None:
        self._stream = None
        self._release()
        self.unregisterProducer()
        self._sent()

    def _release(self) -> None:
        if self._hold is not None:
            self.factory.held.end(self._hold)
            self._hold = None

    def drop_slow(self) -> str:
        """The answer that it takes too long for keeps data that are not served any more."""
        self.factory.rejected["slow_client"] += 1
        peer = self.transport.getPeer()
        self.transport.abortConnection()
        return f"{peer.host}:{peer.port}"

    def _not_streamed(self, failure: Failure) -> None:
        if not failure.check(TaskStopped):
            self._lost(failure)

    def _lost(self, failure: Failure) -> None:
        self._log.failure("a dataset could not be streamed", failure)
        self.transport.abortConnection()  # so that the client cannot take a part for the whole

    def _sent(self) -> None:
        """The answer is out, to the transport at least. Go on with the next request when that is fair."""
        if self._waitingForTransport:
            self._answered_while_choked = True
        elif (self._buffer or self._dataBuffer) and time.perf_counter() >= self._turn_ends_at:
            self._yielding = self.factory.clock.callLater(0, self._next)
        else:
            self._next()

    def _next(self) -> None:
        self._yielding = None
        self._limit(self._patience_s)
        self.requestDone(self.requests[0])
        # Within dataReceived there may be more requests to come out of what was received.
        if self._read_closed and not (self._busyReceiving or self._handlingRequest or self._finishing):
            self._finish()

    # What the client takes

    def pauseProducing(self) -> None:
        """The client does not read. Nor do we: HTTPChannel would, while it waits for an answer to be made."""
        super().pauseProducing()
        self._networkProducer.pauseProducing()
        self._limit(self._patience_s)

    def resumeProducing(self) -> None:
        self._deadline_at = None
        self._direct = self._may_be_direct  # the transport has sent all that it had
        super().resumeProducing()
        if not self._read_closed and sum(map(len, self._dataBuffer)) <= self._optimisticEagerReadSize:
            self._networkProducer.resumeProducing()
        if self._answered_while_choked:
            self._answered_while_choked = False
            self._next()
        elif not self._handlingRequest:
            self._limit(self._patience_s)

    # The end

    def _refuse(self, status: int, detail: str) -> None:
        """Answer what is no request, or one too many; nothing after it can be understood."""
        if self._finishing:
            return
        if status == 503:
            self._note_refusal()
        else:
            self.factory.rejected[_REASONS.get(status, "protocol_error")] += 1
        head, body = self.factory.answers.problem(Problem(status, detail), b"")
        self._write(head + _CLOSE, body, self._command != b"HEAD")
        self._finish()

    def _note_refusal(self) -> None:
        self.factory.rejected["too_many_connections"] += 1
        self.factory.door.note_refusal(self.factory.max_connections)

    def loseConnection(self) -> None:
        """HTTPChannel's word for: the last answer is out."""
        self._finish()

    def _finish(self) -> None:
        """Nothing more will be said; the connection ends when the client closes, or soon."""
        self._finishing = True
        self.clearLineBuffer()
        self._dataBuffer.clear()
        self._networkProducer.unregisterProducer()
        self._limit(self._patience_s)
        if self._read_closed or self._in_reserve:  # a place in reserve is free at once
            self.transport.loseConnection()
        else:
            self.transport.loseWriteConnection()
            self.transport.resumeProducing()

    def readConnectionLost(self) -> None:
        """The client sent all it will. Whoever waits is taken to be gone; an answer that will end goes on."""
        self._read_closed = True
        stream = self._stream
        if stream is not None and stream.endless:
            self._stream = None
            stream.stopProducing()
            self.unregisterProducer()
            if stream.chunked:
                self._put(_LAST_CHUNK)
            self._finish()
        elif (self._waiting is not None and not self._is_made) or self._finishing or not self._handlingRequest:
            self._finish()

    def writeConnectionLost(self) -> None:
        """Our last word is out; the client's end of the connection is all that is still to come."""
        self._limit(_LINGER_S)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        super().connectionLost(reason)
        self.factory.clients.discard(self)
        self.factory.door.left(self, was_admitted=not self._in_reserve)
        self._finishing = True
        self._deadline_at = None
        for call in (self._timer, self._yielding):
            if call is not None:
                call.cancel()
        self._timer = self._yielding = None
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        if self._stream is not None:
            self._stream.stopProducing()
            self._stream = None
        self._release()
        self.requests.clear()

    # Time

    def _limit(self, seconds: float) -> None:
        """The current phase ends by then. Making and cancelling a timer each time would cost more than a look-up."""
        clock = self.factory.clock
        self._deadline_at = at = clock.seconds() + seconds
        if self._timer is None:
            self._timer = clock.callLater(seconds, self._expire)
        elif self._timer.getTime() > at:
            self._timer.reset(seconds)

    def _expire(self) -> None:
        self._timer = None
        if self._deadline_at is None:
            return
        left_s = self._deadline_at - self.factory.clock.seconds()
        if left_s > 0:
            self._timer = self.factory.clock.callLater(left_s, self._expire)
        elif self._in_reserve and not (self._finishing or self._waitingForTransport):
            self._refuse(503, self._too_many())
        elif self._in_head and not self._finishing:
            self._refuse(408, f"the head did not come to its end within {self.factory.head_timeout_s:g} s")
        elif not (self._finishing or self._waitingForTransport):
            self._finish()
            self._limit(_LINGER_S)
        else:
            self.factory.rejected["slow_client"] += self._waitingForTransport
            self.transport.abortConnection()


class HttpFactory(ServerFactory):
    """Makes the channels of the HTTP port.

    :param freshness: what ``?max_age=`` waits on.
    :param idle_timeout_s: of silence between requests, and of taking nothing of an answer, after which a client
        is dropped.
    :param reactor: `IReactorTime`, monotonic, and `IReactorThreads`.
    :param refreshes: what commands go to.
    :param token: what /v1, / and /events need; empty for none.
    :param admin_token: what commands need; empty for no commands.
    :param allow_data: False answers 403 to everything but probes and metrics as long as there is no token.
    :param exposition: what /metrics serves; None for no such page.
    :param head_timeout_s: from the first byte of a request's head to its last.
    :param held: knows the answers in progress; None to limit none.
    :param door: lets clients in; None for one that only `max_connections` closes.
    :param look: has the files of the tokens read again.
    """

    noisy = False

    def __init__(
        self,
        *,
        cache: Cache,
        freshness: Freshness,
        refreshes: Refreshes,
        max_connections: int,
        idle_timeout_s: float,
        reactor: Any,
        token: str = "",
        admin_token: str = "",
        allow_data: bool = True,
        exposition: Exposition | None = None,
        head_timeout_s: float = HEAD_TIMEOUT_S,
        door: Door | None = None,
        held: HeldSnapshots | None = None,
        look: Look = no_files,
    ) -> None:
        self.held = held or Unlimited()
        self.door = door or open_door(reactor.seconds)
        self.max_connections = max_connections
        self.idle_timeout_s = idle_timeout_s
        self.head_timeout_s = head_timeout_s
        self.clock = reactor
        self.clients: set[HttpChannel] = set()
        self.bodies = GzipBodies(reactor)
        self.rejected = rejected.none_yet()
        self.feed = Feed(cache, reactor)
        needs_token = token or admin_token
        self._guard = guard = Guard(token, admin_token, self.rejected, reactor, look=look) if needs_token else None
        self.answers = Answers(
            cache,
            freshness,
            refreshes,
            self.bodies,
            Digests(reactor),
            self.feed,
            guard,
            allow_data,
            assets.load(),
            exposition,
        )
        self.streams = Cooperator(_turn, partial(reactor.callLater, 0))

    def buildProtocol(self, addr: object) -> HttpChannel:  # type: ignore[override]  # it holds another `factory`
        return HttpChannel(self)

    def replace_tokens(self, token: str, admin_token: str) -> None:
        """Ask for these from now on. A stream of events that has begun goes on."""
        if self._guard is not None:
            self._guard.replace(token, admin_token)

    def close_clients(self) -> None:
        """End every connection now."""
        for client in list(self.clients):
            client.transport.abortConnection()
        self.feed.stop()
        self.bodies.forget()


def _turn() -> Callable[[], bool]:
    """Whether the streams have had their turn of the reactor."""
    ends_at = time.perf_counter() + _STREAMS_TURN_S
    return lambda: time.perf_counter() >= ends_at
