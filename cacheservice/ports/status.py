"""The status port: reads a line, sends the reply and closes the connection.

After `prompt` the connection stays open.

The admin socket speaks the same protocol and adds commands that change the service.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import ServerFactory, connectionDone
from twisted.logger import Logger
from twisted.protocols.basic import LineReceiver
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure
from zope.interface import implementer

from cacheservice.base.interfaces import Clock
from cacheservice.ports import rejected
from cacheservice.ports.admission import RESERVE_S, Door, open_door
from cacheservice.ports.operator_commands import Commands

MAX_LINE_BYTES = 256
_LINGER_S = 2.0
"""The time that a client has to close the connection after the last reply. If the service closed first with unread
input, it would send a reset that overtakes the reply (RFC 1122, 4.2.2.13)."""


@implementer(IHalfCloseableProtocol)
class StatusProtocol(LineReceiver, TimeoutMixin):
    """The connection of one client.

    It answers one line per turn of the reactor, so that a flood of lines delays no other client.
    """

    transport: Any
    delimiter = b"\n"
    MAX_LENGTH = MAX_LINE_BYTES + len(b"\r")

    _log = Logger()
    # Class attributes until they change: attributes of each instance would cost memory for ten thousand idle clients.
    _prompting = False
    _finishing = False
    _choked = False
    _waiting = False
    _in_reserve = False
    _input_ended = False
    _yielding: Any = None

    def __init__(self, factory: StatusFactory) -> None:
        self.factory: StatusFactory = factory

    def callLater(self, delay_s: float, call: Callable[[], None]) -> Any:
        """Schedule a call on the factory's clock, for TimeoutMixin."""
        return self.factory.clock.callLater(delay_s, call)

    def connectionMade(self) -> None:
        self.factory.clients.add(self)
        # The transport pauses this producer while its buffer is full: a client that never reads costs one reply.
        self.transport.registerProducer(self, True)
        # Over the limit, a client has the same commands but is closed first: monitors use this port.
        self._in_reserve = not self.factory.door.admit(self, self.factory.max_connections)
        self.setTimeout(self._patience_s)

    @property
    def _patience_s(self) -> float:
        """The time that the client may be silent, or may read nothing of a reply."""
        return RESERVE_S if self._in_reserve else self.factory.idle_timeout_s

    def turn_away(self) -> None:
        """Close the connection: its reserve place is needed, or it was silent too long."""
        self.factory.rejected["too_many_connections"] += 1
        self.factory.door.note_refusal(self.factory.max_connections)
        if self._finishing or self._choked or self._waiting:
            self.transport.abortConnection()
            return
        self._say(f"ERROR too many connections, the limit is {self.factory.max_connections}")
        self._finishing = True
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def lineReceived(self, line: bytes) -> None:
        if self._finishing:
            return
        self.resetTimeout()
        line = line.removesuffix(b"\r")
        if len(line) > MAX_LINE_BYTES:
            self.lineLengthExceeded(line)
            return
        commands = [command for part in line.decode("utf-8", "replace").split(";") if (command := part.strip())]
        if not commands:
            self._say("ERROR no command; try help")
        self._run(commands)

    def _run(self, commands: list[str]) -> None:
        """Answer the commands of a line one after the other, then close or continue."""
        for number, command in enumerate(commands, 1):
            if command == "quit":
                self._finish()
                return
            if command == "prompt":
                self._prompting = True
                self._say("")
                continue
            answer = self._answer(command)
            if isinstance(answer, Deferred):
                self._wait(answer, commands[number:])
                return
            self._say(answer)
        if self._prompting and not self._input_ended:
            self._yield()
        else:
            self._finish()

    def _wait(self, answer: Deferred[str], rest: list[str]) -> None:
        """Send a reply when it is ready, then continue with the line.

        Reads pause until then.
        """
        self._waiting = True
        self.setTimeout(None)
        super().pauseProducing()

        def arrived(reply: str) -> None:
            self._waiting = False
            if self not in self.factory.clients:
                return
            self.setTimeout(self._patience_s)
            self._say(reply)
            self._run(rest)

        answer.addErrback(self._broke).addCallback(arrived)

    def lineLengthExceeded(self, line: bytes) -> None:
        if not self._finishing:
            self.factory.rejected["protocol_error"] += 1
            self._say(f"ERROR the line is longer than {MAX_LINE_BYTES} bytes")
            self._finish()

    def readConnectionLost(self) -> None:
        """Handle the end of the client's input: ``printf status | nc -N``.

        A last line without a line's end counts as a line.
        """
        if self._finishing:
            self.transport.loseConnection()
            return
        self._input_ended = True
        rest = self.clearLineBuffer()
        if rest:
            self.lineReceived(rest)
        if not self._finishing and not self._waiting:
            self._finish()

    def writeConnectionLost(self) -> None:
        """Wait for the client to close, because the last reply has been sent."""
        self.setTimeout(_LINGER_S)
        super().resumeProducing()

    def timeoutConnection(self) -> None:
        if self._in_reserve and not self._finishing:
            self.turn_away()
            return
        self.factory.rejected["slow_client"] += self._choked
        self.transport.abortConnection()

    def pauseProducing(self) -> None:
        self._choked = True
        super().pauseProducing()

    def resumeProducing(self) -> None:
        self._choked = False
        if self._yielding is None and not self._waiting:
            super().resumeProducing()

    def stopProducing(self) -> None:
        """Do nothing: the transport has gone, and connectionLost follows."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.setTimeout(None)
        if self._yielding is not None:
            self._yielding.cancel()
            self._yielding = None
        self.factory.clients.discard(self)
        self.factory.door.left(self, was_admitted=not self._in_reserve)

    def _answer(self, command: str) -> str | Deferred[str]:
        try:
            return self.factory.commands.answer(command)
        except Exception:
            return self._broke(Failure())

    def _broke(self, failure: Failure) -> str:
        self._log.failure("a status command failed", failure)
        return "ERROR an internal error; its traceback is in the log"

    def _say(self, reply: str) -> None:
        text = f"{reply}\n" if reply else ""
        if self._prompting:
            text += "\n"
        self.transport.write(text.encode())

    def _yield(self) -> None:
        """Continue with the next line in the next turn."""
        super().pauseProducing()
        self._yielding = self.callLater(0, self._go_on)

    def _go_on(self) -> None:
        self._yielding = None
        if not self._choked:
            super().resumeProducing()

    def _finish(self) -> None:
        """Send no more replies; close when the client closes, or soon after the last one."""
        self._finishing = True
        self.clearLineBuffer()
        self.setTimeout(self._patience_s)
        self.transport.unregisterProducer()
        self.transport.loseWriteConnection()


class StatusFactory(ServerFactory):
    """Builds the protocol of the status port, or with `refreshes` the admin socket.

    :param clock: `IReactorTime`.
    :param door: admits clients; None for a door that closes only at `max_connections`.
    """

    noisy = False

    def __init__(
        self, commands: Commands, max_connections: int, idle_timeout_s: float, clock: Clock, door: Door | None = None
    ) -> None:
        self.door = door or open_door(clock.seconds)
        self.commands = commands
        self.max_connections = max_connections
        self.idle_timeout_s = idle_timeout_s
        self.clock = clock
        self.clients: set[StatusProtocol] = set()
        self.rejected = rejected.none_yet()

    def buildProtocol(self, addr: object) -> StatusProtocol:  # type: ignore[override]  # its `factory` has another type
        return StatusProtocol(self)

    def close_clients(self) -> None:
        """Abort every connection now."""
        for client in list(self.clients):
            client.transport.abortConnection()
