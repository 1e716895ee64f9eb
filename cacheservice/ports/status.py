"""The status port: reads a line, sends the reply and closes the connection.

After `prompt` the connection stays open.

The admin socket speaks the same protocol and adds commands that change the service.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice.base.interfaces import Clock
from cacheservice.ports.client_socket import ENDING, READING, WAITING, YIELDED
from cacheservice.ports.clients import ClientFactory, Limits
from cacheservice.ports.connection import Connection
from cacheservice.ports.operator_commands import Commands

MAX_LINE_BYTES = 256


class StatusProtocol(Connection):
    """The connection of one client; see `cacheservice.ports.connection` for its states.

    It answers one line per turn of the reactor, so that a flood of lines delays no other client. After `prompt` the
    connection stays open; otherwise it ends with the first line.
    """

    factory: StatusFactory
    # Class attributes until they change, as in the base class.
    _input = b""
    _commands: Sequence[str] = ()
    """The commands of the current line that have not been answered."""
    _prompting = False

    def __init__(self, factory: StatusFactory) -> None:
        self.factory = factory

    def turn_away(self) -> None:
        """Close the connection: its reserve place is needed, or it was silent too long."""
        self.note_refusal()
        if self.phase in (READING, YIELDED) and not self.is_choked:
            self._reply(f"ERROR too many connections, the limit is {self.factory.max_connections}")
            self.finish(linger=False)
        else:
            self.abort()

    def patience_s(self) -> float:
        return math.inf if self.phase is WAITING else super().patience_s()

    def timed_out(self) -> None:
        # Over the limit, a client has the same commands but is closed first: monitors use this port.
        if self.is_admitted or self.phase in ENDING:
            super().timed_out()
        else:
            self.turn_away()

    def dataReceived(self, data: bytes) -> None:
        if self.phase in ENDING:
            return
        self._input += data
        if self.phase is READING and not self.is_choked:
            self.work()

    def input_over(self) -> None:
        """Handle the end of the client's input: ``printf status | nc -N``."""
        if self.phase is READING and not self.is_choked:
            self.work()

    def work(self) -> None:
        """Answer the rest of the current line, or else the next line."""
        if not self._commands:
            line = self._next_line()
            if line is None:
                if self.input_ended:
                    self.finish()
                return
            # Each line has the whole patience, but not each of its pieces.
            self.restart_limit()
            if len(line) > MAX_LINE_BYTES:
                self.factory.rejected["protocol_error"] += 1
                self._reply(f"ERROR the line is longer than {MAX_LINE_BYTES} bytes")
                self.finish()
                return
            self._commands = [
                command for part in line.decode("utf-8", "replace").split(";") if (command := part.strip())
            ]
            if not self._commands:
                self._reply("ERROR no command; try help")
        self._run()

    def _next_line(self) -> bytes | None:
        """Remove and return the next line; None if it is incomplete.

        A last line without a line's end counts as a line, and so does one that is too long.
        """
        line, newline, rest = self._input.partition(b"\n")
        if not newline and len(line) <= MAX_LINE_BYTES + len(b"\r") and not (line and self.input_ended):
            return None
        self._input = rest
        return line.removesuffix(b"\r")

    def _run(self) -> None:
        """Answer the commands of a line one after the other, then close or continue."""
        while self._commands:
            if self.is_choked:
                return  # the rest follows when the client has read this
            command, *self._commands = self._commands
            if command == "quit":
                self.finish()
                return
            if command == "prompt":
                self._prompting = True
                self._reply("")
                continue
            answer = self._answer(command)
            if isinstance(answer, Deferred):
                self.wait_for(answer, self._arrived, self._failed)
                if self.phase is WAITING:
                    self.transport.pauseProducing()
                return
            self._reply(answer)
            if self.phase is not READING:
                return  # the connection has been lost
        if self._prompting and (self._input or not self.input_ended):
            self.yield_turn()
        else:
            self.finish()

    def _arrived(self, reply: str) -> None:
        """Send a reply that was not ready, then continue with the line."""
        self._reply(reply)
        if self.phase is READING:
            self._run()

    def _failed(self, failure: Failure) -> None:
        self._arrived(self._broke(failure))

    def _answer(self, command: str) -> str | Deferred[str]:
        try:
            return self.factory.commands.answer(command)
        except Exception:
            return self._broke(Failure())

    def _broke(self, failure: Failure) -> str:
        self._log.failure("a status command failed", failure)
        return "ERROR an internal error; its traceback is in the log"

    def _reply(self, reply: str) -> None:
        text = f"{reply}\n" if reply else ""
        if self._prompting:
            text += "\n"
        if text:
            self.send(text.encode())


class StatusFactory(ClientFactory[StatusProtocol]):
    """Creates the connections of the status port, or those of the admin socket.

    :param clock: `IReactorTime`.
    """

    def __init__(self, commands: Commands, limits: Limits, clock: Clock) -> None:
        super().__init__(limits, clock)
        self.commands = commands

    def buildProtocol(self, addr: object) -> StatusProtocol:  # type: ignore[override]  # its `factory` has another type
        return StatusProtocol(self)
