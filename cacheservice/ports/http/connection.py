"""The connections of the HTTP port.

A connection parses one request at a time, even if they were pipelined, and answers it before it parses the next. A read
has no body, form or cookie, and most responses are one write. `cacheservice.ports.connection` describes the states, and
`cacheservice.ports.http.request_head` the checks of a head. The port adds these rules:

- A head has one deadline, from its first byte to its last.
- A client that waits for a response, or reads it, has no limit of time; between two requests it has the idle timeout.
- A client that has closed its side is gone if its reply waits for a refresh, or never ends. Other replies continue.
- Over the limit of connections only probes are answered, and the connection is closed after the response.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import MappingProxyType

from twisted.internet.defer import Deferred
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure

from cacheservice.base.interfaces import Clock
from cacheservice.ports import rejected
from cacheservice.ports.client_socket import ENDING, READING, STREAMING, WAITING, IpAddress
from cacheservice.ports.clients import ClientFactory, Limits
from cacheservice.ports.connection import READ_AHEAD_BYTES, Connection
from cacheservice.ports.http.bodies import PIECE_BYTES
from cacheservice.ports.http.exchange import LAST_CHUNK, Exchange, send_last
from cacheservice.ports.http.messages import Later, Reply
from cacheservice.ports.http.problem import Problem
from cacheservice.ports.http.request_head import HeadParser, Refusal
from cacheservice.ports.http.routes import Routes

HEAD_TIMEOUT_S = 10.0

_PIPELINE_TURN_S = 0.001
"""The time for which the pipelined requests of one client may block the reactor."""
_REASONS: Mapping[int, rejected.Reason] = MappingProxyType({408: "slow_client"})
"""The reason of a refusal by its status; every other status is a protocol error."""


class HttpClients(ClientFactory["HttpConnection"]):
    """Creates the connections of the HTTP port; a subclass sets `routes`.

    :param head_timeout_s: from the first byte of a request's head to its last.
    """

    routes: Routes

    def __init__(self, limits: Limits, clock: Clock, head_timeout_s: float) -> None:
        super().__init__(limits, clock)
        self.head_timeout_s = head_timeout_s

    def buildProtocol(self, addr: object) -> HttpConnection:  # type: ignore[override]  # its `factory` has another type
        return HttpConnection(self)


class HttpConnection(Connection):
    """The connection of one client.

    Its path from `dataReceived` to `send` is hot (benchmarks.http).
    """

    factory: HttpClients
    # Rendering takes longer than sending: this is 0.7 ms. A client that does not read costs this much memory.
    bytes_per_turn = 2 * PIECE_BYTES

    # Class attributes until they change, as in the base class.
    _exchange: Exchange | None = None
    _is_in_head = False

    def __init__(self, factory: HttpClients) -> None:
        self.factory = factory
        self._parser = HeadParser()

    def connectionMade(self) -> None:
        # A small response must not wait for the acknowledgement of the one before it (Nagle's algorithm).
        self.transport.setTcpNoDelay(True)
        super().connectionMade()

    def host(self) -> str:
        address = self.transport.getPeer()
        return address.host if isinstance(address, IpAddress) else ""

    # Requests

    def read_on(self) -> None:
        if self.phase is not STREAMING or self._parser.waiting_bytes <= READ_AHEAD_BYTES:
            super().read_on()

    def dataReceived(self, data: bytes) -> None:
        if self.phase is READING:
            self._parser.receive(data)
            self.work()
        elif self.phase not in ENDING:
            self._parser.receive(data)
            if self._parser.waiting_bytes > READ_AHEAD_BYTES:
                self.transport.pauseProducing()

    def work(self) -> None:
        """Answer the requests received so far, one after the other."""
        parser, ends_at = self._parser, time.perf_counter() + _PIPELINE_TURN_S
        while (parsed := parser.next()) is not None:
            if isinstance(parsed, Refusal):
                self._refuse(parsed.status, parsed.detail)
                return
            if self._exchange is None:
                self._is_in_head = False
                self.heard_at = self.factory.clock.seconds()
            self._exchange = exchange = Exchange(self, parsed)
            reply = exchange.reply(self.factory.routes)
            if not isinstance(reply, Reply):
                self._wait(exchange, reply)
                return
            exchange.send(reply)
            if self.phase is not READING:
                return  # the rest is streamed, or the client has gone
            if not exchange.persistent:
                self.finish()
                return
            if self.is_choked or (parser.waiting_bytes and time.perf_counter() >= ends_at):
                self.yield_turn()
                return
        self._exchange = None
        if self.input_ended:
            self.finish()
        elif parser.is_in_head and not self._is_in_head:
            self._is_in_head = True
            self.restart_limit()

    def _wait(self, exchange: Exchange, reply: Later) -> None:
        coming = reply if isinstance(reply, Deferred) else Deferred.fromCoroutine(reply)
        exchange.wait(for_an_event=coming is not reply)
        self.wait_for(coming, self._arrived, self._failed)

    def _arrived(self, reply: Reply) -> None:
        assert self._exchange is not None, "a reply is to a request"
        self._exchange.send(reply)
        if self.phase is READING:
            self.streamed()
        elif self.phase is STREAMING and self.input_ended:
            self.input_over()

    def _failed(self, failure: Failure) -> None:
        assert self._exchange is not None, "a reply is to a request"
        assert failure.value is not None, "a failure has an exception"
        self._arrived(self._exchange.refusal(self.factory.routes, failure.value))

    def streamed(self) -> None:
        """Continue after a reply that was not sent at once."""
        if self._exchange is not None and self._exchange.persistent:
            self.yield_turn()
        else:
            self.finish()

    # Refusals and the end

    def turn_away(self) -> None:
        if self.phase is READING:
            self._refuse(503, self.too_many())
        else:
            self.abort()

    def too_many(self) -> str:
        """Return the reason of a refusal because of the limit of connections."""
        return f"too many connections, the limit is {self.factory.max_connections}"

    def _refuse(self, status: int, detail: str) -> None:
        """Refuse an invalid request, or one over the limit, and finish.

        The bytes after it cannot be parsed.
        """
        if status == 503:
            self.note_refusal()
        else:
            self.factory.rejected[_REASONS.get(status, "protocol_error")] += 1
        refusal = self.factory.routes.refusal(Problem(status, detail), b"")
        send_last(self, refusal, with_body=self._parser.method != b"HEAD")
        if self.phase not in ENDING:
            self.finish()

    def finish(self, *, linger: bool = True) -> None:
        """Send no more responses.

        A client over the limit need not close first, so that its place is free at once.
        """
        self._parser.close()
        self.restart_limit()
        super().finish(linger=linger and self.is_admitted)

    def input_over(self) -> None:
        exchange = self._exchange
        if self.phase is READING:
            self.finish()
        elif exchange is not None and exchange.ends_with_input:
            self._end_exchange(exchange)

    def close_now(self) -> None:
        """Close the connection because the port stops.

        An event stream ends after a whole chunk, if its client has read all events. Another reply is aborted, so that
        its client cannot take a part for the whole.
        """
        exchange = self._exchange
        if self.phase is STREAMING and exchange is not None and exchange.ends_with_input and not self.is_choked:
            self._end_exchange(exchange, linger=False)
        else:
            super().close_now()

    def _end_exchange(self, exchange: Exchange, *, linger: bool = True) -> None:
        """End a reply that waits for an event, or an endless one, which is complete at each of its ends."""
        if self.phase is STREAMING and exchange.is_chunked:
            self.end_stream()
            self.send(LAST_CHUNK)
        self.finish(linger=linger)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        super().connectionLost(reason)
        self._exchange = None

    # Time

    def patience_s(self) -> float:
        if self.phase in (WAITING, STREAMING) and not self.is_choked:
            return math.inf
        if self._is_in_head and self.phase is READING and self.is_admitted:
            return self.factory.head_timeout_s
        return super().patience_s()

    def timed_out(self) -> None:
        if self.phase is not READING or self.is_choked:
            super().timed_out()
        elif not self.is_admitted:
            self._refuse(503, self.too_many())
        elif self._is_in_head:
            self._refuse(408, f"the head did not come to its end within {self.factory.head_timeout_s:g} s")
        else:
            self.finish()
