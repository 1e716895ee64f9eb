"""The session of one Redis client: bytes in, replies out, without a socket.

The connection feeds the input and calls `work`, which runs commands until the input or the turn is over, or a reply is
not ready, and returns the replies. `step` is how to continue:

======  ==============================================================================================
step    meaning
======  ==============================================================================================
READ    All commands have run; the session needs more input.
MORE    More commands are waiting: call `work` again in the next turn.
ANSWER  The next reply is `pending`: an iterator or a Deferred. Call `work` again after it.
CLOSE   The session has ended: send the replies, then close the connection.
ABORT   The client is not a Redis client: close the connection at once.
======  ==============================================================================================
"""

from __future__ import annotations

import enum

from twisted.logger import Logger
from twisted.python.failure import Failure

from cacheservice.ports.clients import BYTES_PER_TURN
from cacheservice.ports.resp import reply
from cacheservice.ports.resp.datasets import Datasets
from cacheservice.ports.resp.inline import ProtocolViolation
from cacheservice.ports.resp.reply import CommandError
from cacheservice.ports.resp.requests import RequestParser
from cacheservice.ports.resp.server import (
    COMMANDS_PER_TURN,
    InMulti,
    Link,
    Reply,
    Server,
    Transaction,
    Words,
    printable,
)
from cacheservice.ports.resp.state import LOCKED, PLAIN, SUBSCRIBED, ClientState

_MOST_QUEUED = 10_000
"""The most commands in one MULTI block."""
_CROSS_PROTOCOL = (b"post", b"host:")
_NOAUTH = reply.error("NOAUTH Authentication required.")
_INTERNAL_ERROR = reply.error("ERR internal error; its traceback is in the log")


class Step(enum.Enum):
    """How a connection continues after `work`; see the docstring of the module."""

    READ = enum.auto()
    MORE = enum.auto()
    ANSWER = enum.auto()
    CLOSE = enum.auto()
    ABORT = enum.auto()


# Globals, because a look-up in the class would take longer than the comparison.
_READ, _MORE, _ANSWER, _CLOSE, _ABORT = Step


class Session(ClientState):
    """Runs the commands of one client.

    `step` is how to continue after `work`; `pending` is the reply for the step ANSWER.

    :param number: the id that CLIENT ID returns.
    """

    __slots__ = ("_left", "_parser", "pending", "step")

    _log = Logger()

    def __init__(self, server: Server, number: int, link: Link) -> None:
        self._parser = RequestParser()
        self._left: list[list[bytes]] = []
        self.step = _READ
        self.pending: Reply | None = None
        super().__init__(server, number, link)

    # The input

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the client.

        :raises ProtocolViolation: if a request does not end within 64 MiB.
        """
        self._parser.feed(data)

    def refuse(self, violation: ProtocolViolation) -> bytes:
        """End the session after bytes that are not a request; return the error."""
        self.server.port.rejected["protocol_error"] += 1
        self.step = _CLOSE
        return reply.error(f"ERR {violation}")

    @property
    def is_within_request(self) -> bool:
        """Whether the client has sent a part of a request."""
        return self._parser.is_within_request

    def work(self) -> list[bytes]:
        """Run commands until the input is done, the turn is over, or one must wait; return their replies."""
        try:
            batch = self._left or self._parser.take(COMMANDS_PER_TURN)
        except ProtocolViolation as violation:
            return [self.refuse(violation)]
        server = self.server
        self.step = _READ
        out: list[bytes] = server.fast.hits(batch) if self.mode is PLAIN else []
        size_bytes = sum(map(len, out))
        if size_bytes >= BYTES_PER_TURN:
            size_bytes = server.fast.cut(batch, out, BYTES_PER_TURN)
        if len(out) < len(batch) and size_bytes < BYTES_PER_TURN:
            self._run(batch, out, size_bytes)
        done = len(out) + (self.step is _ANSWER)
        self._left = batch[done:]
        if done:
            self.last_command = batch[done - 1][0]
            server.count_commands(done)
        if self.step is _READ and (self._left or not self._parser.exhausted):
            self.step = _MORE
        return out

    def _run(self, batch: list[list[bytes]], out: list[bytes], size_bytes: int) -> None:
        """Run the commands of `batch` that have no reply in `out` yet; add their replies."""
        server = self.server
        by_word, datasets = server.table.by_word, server.datasets
        for words in batch[len(out) :] if out else batch:
            command = by_word.get(words[0]) if self.mode is PLAIN else None
            try:
                if command is not None and command.least <= len(words) <= command.most:
                    answer = command.run(datasets, self, words)
                else:
                    answer = self._run_special(words)
            except CommandError as error:
                answer = reply.error(str(error))
            except Exception:
                answer = self.bug()
            if not isinstance(answer, bytes):
                self.step, self.pending = _ANSWER, answer
                return
            out.append(answer)
            size_bytes += len(answer)
            if self.step is not _READ or size_bytes >= BYTES_PER_TURN:
                return

    def bug(self, failure: Failure | None = None) -> bytes:
        """Log the exception of a command; return the error for the client.

        :param failure: None for the exception that is being handled.
        """
        self._log.failure("a command failed", failure)
        return _INTERNAL_ERROR

    def take_pending(self) -> Reply:
        """Return the reply that is not ready, for the step ANSWER."""
        pending, self.pending = self.pending, None
        assert pending is not None, "the step is ANSWER"
        return pending

    def _run_special(self, words: Words) -> Reply:
        """Run a command in any mode and spelling, and with any number of words."""
        name, mode, table = words[0].lower(), self.mode, self.server.table
        if name in _CROSS_PROTOCOL:
            # An HTTP request: an attacker may use a browser to send commands (as in Redis, CVE-2016-10517).
            self._log.warn("a request of another protocol came to the RESP port")
            self.server.port.rejected["protocol_error"] += 1
            self.step = _ABORT
            return b""
        known = table.by_name.get(name)
        if mode is LOCKED and not (known and known.without_password):
            return _NOAUTH
        if mode is SUBSCRIBED and not (known and known.while_subscribed):
            raise CommandError(
                f"ERR Can't execute '{printable(name)}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET "
                "are allowed in this context"
            )
        try:
            command = table.find(name, words)
            if self.transaction is not None and command.in_multi is not InMulti.RUNS:
                return self._enqueue(self.transaction, words, command.in_multi)
        except CommandError as error:
            if name == b"exec":
                self.end_transaction()
                raise CommandError(f"EXECABORT Transaction discarded because of: {str(error)[4:]}") from None
            if self.transaction is not None:
                self.transaction.refuse()
            raise
        return command.run(self.server.datasets, self, words)

    @staticmethod
    def _enqueue(transaction: Transaction, words: Words, how: InMulti) -> bytes:
        if how is InMulti.REFUSED:
            raise CommandError(f"ERR {words[0].lower().decode()} is not allowed in a transaction")
        if len(transaction.queue) >= _MOST_QUEUED:
            raise CommandError(f"ERR a transaction has at most {_MOST_QUEUED} commands")
        transaction.queue.append(words)
        return reply.QUEUED

    def run_queued(self, words: Words, datasets: Datasets) -> Reply:
        """Run a command of a transaction; its error is its reply.

        The reply is a Deferred only if the command asks the main process.
        """
        self.in_transaction = True
        try:
            return self.server.table.find(words[0].lower(), words).run(datasets, self, words)
        except CommandError as error:
            return reply.error(str(error))
        except Exception:
            return self.bug()
        finally:
            self.in_transaction = False

    # Changes by commands

    def _settle(self, *, is_locked: bool = False) -> None:
        super()._settle(is_locked=is_locked)
        self._parser.set_authenticated(not is_locked)

    def close(self) -> None:
        """Close the connection after the replies so far."""
        self.step = _CLOSE
