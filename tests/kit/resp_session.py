"""Sessions of Redis clients without sockets: bytes in, replies out."""

from __future__ import annotations

from typing import Any

import hiredis
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from cacheservice.cache.cache import Cache
from cacheservice.ports import rejected
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.passwords import Passwords
from cacheservice.ports.resp import reply
from cacheservice.ports.resp.commands import COMMANDS
from cacheservice.ports.resp.reply import CommandError
from cacheservice.ports.resp.server import Password, Server, Table
from cacheservice.ports.resp.session import Session, Step
from cacheservice.ports.rotation import Look, no_files
from tests.kit.fake_refreshes import FakeRefreshes
from tests.kit.resp import Words, encode


class PortStatus:
    """The limit and the counters of a port."""

    def __init__(self) -> None:
        self.max_connections = 100
        self.rejected = rejected.none_yet()


def make_server(cache: Cache, clock: Clock, password: str = "", look: Look = no_files) -> Server:
    """Return what the sessions of a port share; its clients wait in vain for refreshes."""
    port = PortStatus()
    return Server(
        table=Table(COMMANDS),
        cache=cache,
        freshness=Freshness(FakeRefreshes(), cache.database, clock),
        password=Password(password),
        passwords=Passwords(clock, port.rejected, look),
        port=port,
    )


class FakeLink:
    """The connection of a session that a test feeds.

    `received` is all that the client has got. While `is_choked`, messages wait in the session.
    """

    def __init__(self, server: Server, number: int = 1) -> None:
        self.received = b""
        self.is_waiting = self.is_choked = self.was_dropped = False
        self.session = Session(server, number, self)
        server.connected(self.session)

    def peer(self) -> IPv4Address:
        return IPv4Address("TCP", f"192.0.2.{self.session.id}", 50_000)

    def host(self) -> IPv4Address:
        return IPv4Address("TCP", "192.0.2.200", 6379)

    def age_s(self) -> float:
        return 12.0

    def idle_s(self) -> float:
        return 3.0

    def deliver(self) -> None:
        if not self.is_choked:
            self.received += b"".join(self.session.take_messages())

    def drop_slow(self) -> None:
        self.was_dropped = True

    def send(self, data: bytes) -> None:
        """Feed bytes, and run the session as a connection does, until it needs more input or a reply that waits."""
        self.session.feed(data)
        self.go_on()

    def go_on(self) -> None:
        while not self.is_waiting:
            self.received += b"".join(self.session.work())
            if self.session.step is Step.ANSWER:
                self._answer(self.session.take_pending())
            elif self.session.step is not Step.MORE:
                return

    def _answer(self, answer: Any) -> None:
        if isinstance(answer, Deferred):
            self.is_waiting = True
            answer.addErrback(self._failed).addCallback(self._arrived)
        else:
            self.received += answer if isinstance(answer, bytes) else b"".join(answer)

    def _arrived(self, answer: bytes) -> None:
        self.is_waiting = False
        self._answer(answer)
        self.go_on()

    def _failed(self, failure: Failure) -> bytes:
        failure.trap(CommandError)
        return reply.error(str(failure.value))

    def take(self) -> bytes:
        """Return what the client has got since the last call."""
        received, self.received = self.received, b""
        return received

    def ask(self, *words: bytes | str | int) -> bytes:
        """Send one command; return its reply as bytes."""
        self.send(encode(*words))
        return self.take()

    def ask_all(self, *commands: Words) -> list[Any]:
        """Send commands in one write; return their replies, errors as text."""
        self.send(b"".join(encode(*words) for words in commands))
        return parsed(self.take())


def parsed(data: bytes) -> list[Any]:
    """Return the replies in `data`, which has to be whole."""
    reader = hiredis.Reader()
    reader.feed(data)
    replies = []
    while (each := reader.gets()) is not False:
        replies.append(str(each) if isinstance(each, hiredis.ReplyError) else each)
    assert not reader.has_data(), "the last reply is not whole"
    return replies
