"""The connections of the RESP port: they connect sessions to their sockets.

The replies of all clients are written at the end of a turn, as in Redis: if each reply woke its client at once, most
wake-ups would be in vain. See `cacheservice.ports.connection` for the states of a connection, and
`cacheservice.ports.resp.session` for those of a session.
"""

from __future__ import annotations

import math
from itertools import count
from typing import cast

from twisted.internet.defer import Deferred
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from cacheservice.base.interfaces import Clock, DelayedCall
from cacheservice.base.timers import is_active
from cacheservice.cache.cache import Cache
from cacheservice.ports.client_socket import ENDING, READING, STREAMING, WAITING, IpAddress
from cacheservice.ports.clients import ClientFactory, Limits
from cacheservice.ports.connection import Connection
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.passwords import Passwords
from cacheservice.ports.resp import reply
from cacheservice.ports.resp.commands import COMMANDS
from cacheservice.ports.resp.inline import ProtocolViolation
from cacheservice.ports.resp.reply import CommandError
from cacheservice.ports.resp.server import PASSWORD, Password, Reply, Server, Table
from cacheservice.ports.resp.session import Session, Step
from cacheservice.ports.resp.whole import Whole
from cacheservice.ports.rotation import Look, no_files

_READ, _MORE, _ANSWER, _CLOSE, _ABORT = Step
_TOO_MANY = reply.error("ERR max number of clients reached")


class RespConnection(Connection):
    """The connection of one client.

    A client that does not read its replies is dropped after the idle time. A client that is only silent is kept, unless
    `silence_timeout_s` is set; TCP keepalive detects dead peers.
    """

    factory: RespFactory
    _unsent: list[bytes] | None = None

    def __init__(self, factory: RespFactory, number: int) -> None:
        self.factory = factory
        self.session = Session(factory.server, number, self)
        self._connected_at = factory.clock.seconds()

    def connectionMade(self) -> None:
        # A small reply must not wait for the next one (Nagle's algorithm).
        self.transport.setTcpNoDelay(True)
        self.factory.server.connected(self.session)
        super().connectionMade()
        if not self.is_admitted:
            self.turn_away()

    def turn_away(self) -> None:
        """Refuse this client because there are too many; this port serves no probes."""
        self.note_refusal()
        self.send(_TOO_MANY)
        self.finish(linger=False)

    def patience_s(self) -> float:
        session, factory = self.session, self.factory
        if self.phase is WAITING or (session.channels and not self.is_choked):
            return math.inf
        if self.is_choked or not session.is_authenticated or session.is_within_request:
            return factory.idle_timeout_s
        return factory.silence_timeout_s or math.inf

    # Input

    def dataReceived(self, data: bytes) -> None:
        phase = self.phase
        if phase is not READING and phase in ENDING:
            return
        self.heard_at = self.factory.clock.seconds()
        session = self.session
        try:
            session.feed(data)
        except ProtocolViolation as violation:
            self.flush()
            self.send(session.refuse(violation))
            self.finish(linger=False)
            return
        if phase is READING:
            if not self.is_choked:
                self.work()
        elif phase is WAITING:
            self.count_read_ahead(len(data))

    def work(self) -> None:
        session = self.session
        out = session.work()
        if out:
            if self._unsent is None:
                self._unsent = out
                self.factory.flush_at_end_of_turn(self)
            else:
                self._unsent += out
        step = session.step
        if step is _READ and not self.input_ended:
            return
        if step is _MORE:
            self.yield_turn()
            return
        # Nothing below may overtake the replies.
        self.send_unsent()
        if step is _ANSWER:
            self._begin(session.take_pending())
        elif step is _ABORT:
            self.abort()
        else:
            self.finish(linger=False)

    def _begin(self, answer: Reply) -> None:
        """Send an answer that is ready, too large for this turn, or not ready yet."""
        if isinstance(answer, bytes):
            self.send_unsent()
            self.send(answer)
            # In the next turn: if many answers need no wait, each would add frames to the stack of the one before it.
            self.yield_turn()
        elif isinstance(answer, Deferred):
            self.wait_for(cast("Deferred[Reply]", answer), self._begin, self._failed)
        else:
            self.stream(answer)

    def _failed(self, failure: Failure) -> None:
        if failure.check(CommandError):
            self._begin(reply.error(str(failure.value)))
        else:
            self._begin(self.session.bug(failure))

    def input_over(self) -> None:
        """Handle the end of the client's input.

        The client still gets its replies, except those that have to wait, as in Redis.
        """
        if self.phase is WAITING:
            self.abort()
        elif self.phase is READING and not self.is_choked:
            self.send_unsent()
            self.finish(linger=False)

    # Output

    def send_unsent(self) -> None:
        """Send the replies that were kept for the end of the turn."""
        out = self._unsent
        if out is not None:
            self._unsent = None
            self.send(b"".join(out) if len(out) > 1 else out[0])

    def flush(self) -> None:
        """Send the kept replies, and the messages that arrived during a streamed reply."""
        self.send_unsent()
        if self.session.messages and self.phase is not STREAMING:
            self.send(b"".join(self.session.take_messages()))

    # The link of the session

    @property
    def is_waiting(self) -> bool:
        return self.phase is WAITING

    def age_s(self) -> float:
        return self.factory.clock.seconds() - self._connected_at

    def idle_s(self) -> float:
        return self.factory.clock.seconds() - self.heard_at

    def peer(self) -> IpAddress:
        return cast("IpAddress", self.transport.getPeer())  # this port listens on TCP only

    def host(self) -> IpAddress:
        return cast("IpAddress", self.transport.getHost())

    def deliver(self) -> None:
        if not self.is_choked and self.phase not in ENDING:
            self.flush()

    # The end

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        super().connectionLost(reason)
        session, server = self.session, self.factory.server
        if session.is_authenticated and server.password.is_required:
            # Pools keep connections for hours, and may have to open all of them again at the same time.
            server.passwords.accept(self.peer().host, PASSWORD)
        self._unsent = None
        session.leave()
        server.left(session)
        # Without this cycle their memory is free at once.
        del self.session


class RespFactory(ClientFactory[RespConnection]):
    """Creates the connections of the RESP port, and flushes them at the end of each turn.

    :param password: of the clients; empty for none.
    :param look: reads the file of the password again.
    """

    _log = Logger()

    def __init__(
        self,
        *,
        cache: Cache,
        freshness: Freshness,
        limits: Limits,
        clock: Clock,
        password: str = "",
        look: Look = no_files,
    ) -> None:
        super().__init__(limits, clock)
        self.silence_timeout_s = limits.silence_timeout_s
        self.server = Server(
            table=Table(COMMANDS),
            cache=cache,
            freshness=freshness,
            password=Password(password),
            passwords=Passwords(clock, self.rejected, look),
            port=self,
        )
        self._ids = count(1)
        self._unsent: list[RespConnection] = []
        self._end_of_turn: DelayedCall | None = None
        self._in_round = False

    def buildProtocol(self, addr: object) -> RespConnection:  # type: ignore[override]  # its `factory` has another type
        return RespConnection(self, next(self._ids))

    def join(self, whole: Whole, first_id: int) -> None:
        """Be a part of a service that has other processes.

        :param first_id: the CLIENT ID of the first client of this process. No other process may have ids from there on.
        """
        self.server.join(whole)
        self._ids = count(first_id)

    def replace_password(self, password: str) -> None:
        """Accept only this password from now on. Authenticated clients remain so."""
        self.server.password.replace(password)

    def flush_at_end_of_turn(self, client: RespConnection) -> None:
        """Flush `client` once all input of this turn of the reactor is processed."""
        if not self._unsent and not self._in_round:
            self._end_of_turn = self.clock.callLater(0, self._flush_all)
        self._unsent.append(client)

    def begin_round(self) -> None:
        """Begin a round of reads."""
        self._in_round = True

    def end_round(self) -> None:
        """End a round of reads: flush all clients.

        A timer for this would cost a twentieth of the time of a GET without pipelining.
        """
        self._in_round = False
        if self._unsent:
            self._flush_all()

    def _flush_all(self) -> None:
        self._cancel_end_of_turn()
        unsent, self._unsent = self._unsent, []
        for client in unsent:
            try:
                client.send_unsent()
            except Exception:
                # Replies are missing, so the client must not wait for them.
                self._log.failure("replies could not be sent")
                client.abort()

    def close_clients(self) -> None:
        self._cancel_end_of_turn()
        self._unsent.clear()
        super().close_clients()

    def _cancel_end_of_turn(self) -> None:
        if is_active(self._end_of_turn):
            self._end_of_turn.cancel()
        self._end_of_turn = None
