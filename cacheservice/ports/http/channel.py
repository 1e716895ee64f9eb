"""The connections of the HTTP port.

They are `twisted.web`'s channel, but stricter, bounded and faster. `HTTPChannel` provides lines, request lines, folded
headers, and one request at a time even if they were pipelined. Its `Request` is not used: a read has no body, form or
cookie, and a response is one write. In addition to the checks of twisted.web (RFC 9112 by section):

- 3.2: a request without exactly one valid Host is refused.
- 6: a body is refused before it is read, and so are two lengths or an invalid length.
- The head has one deadline, from its first byte to its last. The timeout of twisted.web restarts with each byte.
- Unread output is bounded: while a client does not read, no more requests are answered or even read. It is dropped if
  it reads less than the buffered data within an idle timeout. (twisted.web continues to read requests meanwhile.)
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import suppress
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

from cacheservice.base.interfaces import DelayedCall, Reactor
from cacheservice.base.timers import next_turns
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
"""The time that a client has to close the connection after the last response. If the service closed first with unread
input, it would send a reset that overtakes the response (RFC 9112, 9.6)."""
_PIPELINE_TURN_S = 0.001
"""The time for which the pipelined requests of one client may block the reactor."""
_STREAMS_TURN_S = 0.001
"""The time for which all streams together may block the reactor; with the last step in progress it is 2 ms."""

_REASONS: Mapping[int, rejected.Reason] = MappingProxyType({408: "slow_client"})
"""The reason of a refusal by its status; every other status is a protocol error."""
_CLOSE = b"Connection: close\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_TLS, _TLS_HANDSHAKE = b"\x16", b"\x16\x03"
"""The first bytes of a TLS record with a ClientHello (RFC 8446, 5.1)."""
_BARE_LF = re.compile(rb"(?<!\r)\n")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t -~\x80-\xff]*)")
_HOST = re.compile(rb"(?:[0-9A-Za-z\-._~%!$&'()*+,;=]*|\[[0-9A-Fa-f:.]+\]|\[v[0-9A-Fa-f]+\.[^\]@/?#]+\])(?::[0-9]*)?")
_ALONE = (b"host", b"content-length", b"transfer-encoding", b"authorization", b"if-modified-since")
"""Headers whose values are not lists. Two of them would contradict each other (RFC 9110, 5.3)."""


@provider(INonQueuedRequestFactory)
class HttpRequest(Request):
    """A request on its channel, with the attributes that `HTTPChannel` uses."""

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
        """Do nothing: the channel ends its work for the request."""


@implementer(IPushProducer)
class _Stream:
    """The rest of a body, sent in turns with the other streams.

    It pauses while the transport does not accept data.
    """

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
        # The maker of the body may have to be notified, and the Deferred of the task may fire late.
        self._pieces.close()


@implementer(IHalfCloseableProtocol)
class HttpChannel(HTTPChannel):
    """The connection of one client."""

    requestFactory = HttpRequest  # type: ignore[assignment]  # it has only the methods that HTTPChannel calls
    totalHeadersSize = MAX_HEAD_BYTES
    requests: list[HttpRequest]
    transport: Any
    _dataBuffer: list[bytes]
    _networkProducer: Any
    _log = Logger()

    # Class attributes until they change: attributes of each instance would cost memory for ten thousand idle clients.
    _command = b""
    _deadline_at: float | None = None
    _timer: DelayedCall | None = None
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
        self._direct = self._may_be_direct = isinstance(self.transport, tcp.Server)  # a TLS transport is another class
        factory = self.factory
        factory.clients.add(self)
        self._in_reserve = not factory.door.admit(self, factory.max_connections)
        self._limit(self._patience_s)

    @property
    def _patience_s(self) -> float:
        """The time that the client may be silent, or may read nothing of a response."""
        return RESERVE_S if self._in_reserve else self.factory.idle_timeout_s

    def turn_away(self) -> None:
        """Close the connection: another connection over the limit needs its place."""
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
        # Two counts cost almost nothing here. A body, which is never read, may contain anything.
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
        """Refuse TLS and lines that end in LF alone at once.

        HTTPChannel would wait for a line's end that never comes.
        """
        if self._handlingRequest:
            return
        before = b"".join(self._dataBuffer) + self._buffer if self._in_head else b""
        if not before and data[:2] == _TLS_HANDSHAKE:
            self._refuse(400, "this port speaks HTTP without TLS: ask for http:// here, or put a proxy in front")
            return
        text = before + data
        is_end = self._in_head and text.startswith(b"\r\n")  # the previous lines have left the buffer
        if not is_end and _BARE_LF.search(text.partition(b"\r\n\r\n")[0]):
            self._refuse(400, "a line ends in LF alone; HTTP's lines end in CR LF")

    def lineReceived(self, line: bytes) -> None:
        if not self._finishing:
            super().lineReceived(line)

    def lineLengthExceeded(self, line: bytes) -> None:
        self._refuse_long_head()

    def _respondToBadRequestAndDisconnect(self) -> None:
        """Replace HTTPChannel's own refusals.

        They are for invalid request lines and for heads that are too long.
        """
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
        """Handle one unfolded header; return False if it was refused."""
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
        """Decide whether the connection persists, before any byte after the head is read."""
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
            self.length = None  # so that HTTPChannel does not go on to the answer

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
            # The body that follows is not read, so the connection ends with the response.
            self.persistent = False
            if self._command in (b"GET", b"HEAD"):
                self._refuse(413, "a read takes no request body")

    # From a request to its response

    def answer(self, request: HttpRequest) -> None:
        """Answer a request, now or later. The next one is not processed before that."""
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
            return  # the client has disconnected
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
        """Write directly to the socket while the transport has no queue for this client.

        `transport.write` waits for the socket to be writable, in the next turn of the reactor. Direct writes allow a
        third more requests/s (measured).
        """
        if self._direct:
            try:
                sent: int = self.transport.socket.sendmsg(parts)
            except OSError:
                sent = 0  # full or lost; the transport will notice
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
        """Abort a response that is too slow and keeps superseded data in memory."""
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
        """Continue after a response, now or in the next turn for fairness.

        The response has been passed at least to the transport.
        """
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
        # Within dataReceived the received data may contain more requests.
        if self._read_closed and not (self._busyReceiving or self._handlingRequest or self._finishing):
            self._finish()

    # Back-pressure

    def pauseProducing(self) -> None:
        """Stop reading while the client does not read.

        HTTPChannel would continue to read while it waits for a response.
        """
        super().pauseProducing()
        self._networkProducer.pauseProducing()
        self._limit(self._patience_s)

    def resumeProducing(self) -> None:
        self._deadline_at = None
        self._direct = self._may_be_direct  # the transport has sent its whole buffer
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
        """Refuse an invalid request, or one over the limit, and finish.

        The bytes after it cannot be parsed.
        """
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
        """Finish, because HTTPChannel calls this after the last response."""
        self._finish()

    def _finish(self) -> None:
        """Send no more responses; close when the client closes, or soon after."""
        self._finishing = True
        self.clearLineBuffer()
        self._dataBuffer.clear()
        self._networkProducer.unregisterProducer()
        self._limit(self._patience_s)
        if self._read_closed or self._in_reserve:  # this frees a place in reserve at once
            self.transport.loseConnection()
        else:
            self.transport.loseWriteConnection()
            self.transport.resumeProducing()

    def readConnectionLost(self) -> None:
        """Handle the end of the client's input.

        A client that waits for a refresh or follows events is considered gone. A response that will end continues.
        """
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
        """Wait for the client to close, because the last response has been sent."""
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
        """Set the deadline of the current phase.

        The timer is reused: to cancel and create a timer each time would cost more than a comparison.
        """
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
    """Builds the channels of the HTTP port.

    :param freshness: serves ``?max_age=``.
    :param idle_timeout_s: a client is dropped after this time of silence between requests, or without reading any of a
        response.
    :param reactor: `IReactorTime`, monotonic, and `IReactorThreads`.
    :param refreshes: the target of commands.
    :param token: required for /v1, / and /events; empty for none.
    :param admin_token: required for commands; empty for no commands.
    :param allow_data: False answers 403 to all requests but probes and metrics while there is no token.
    :param exposition: renders /metrics; None for no such page.
    :param head_timeout_s: from the first byte of a request's head to its last.
    :param held: tracks the responses in progress; None for no limit.
    :param door: admits clients; None for a door that closes only at `max_connections`.
    :param look: reads the files of the tokens again.
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
        reactor: Reactor,
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
        self.streams = Cooperator(_turn, next_turns(reactor))

    def buildProtocol(self, addr: object) -> HttpChannel:  # type: ignore[override]  # its `factory` has another type
        return HttpChannel(self)

    def replace_tokens(self, token: str, admin_token: str) -> None:
        """Require these tokens from now on. Open event streams continue."""
        if self._guard is not None:
            self._guard.replace(token, admin_token)

    def close_clients(self) -> None:
        """Abort every connection now."""
        for client in list(self.clients):
            client.transport.abortConnection()
        self.feed.stop()
        self.bodies.forget()


def _turn() -> Callable[[], bool]:
    """Return a function that returns True when the turn of the streams is over."""
    ends_at = time.perf_counter() + _STREAMS_TURN_S
    return lambda: time.perf_counter() >= ends_at
