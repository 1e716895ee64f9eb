"""The connections of the RESP port.

They receive bytes, run commands and send replies, and no client blocks another one for long.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, count
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol, IPullProducer
from twisted.internet.protocol import Protocol, ServerFactory, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from cacheservice.base.interfaces import Clock, DelayedCall
from cacheservice.base.text import iso
from cacheservice.base.timers import after, is_active
from cacheservice.cache.cache import Cache
from cacheservice.cache.events import Event, Published
from cacheservice.cache.rows import bulk
from cacheservice.ports import rejected
from cacheservice.ports.admission import Door, open_door
from cacheservice.ports.held import HeldSnapshots, Hold, Streamed, Unlimited
from cacheservice.ports.resp import reply
from cacheservice.ports.resp.commands import REDIS_VERSION, SYNTAX, Command, Commands, Reply, Words
from cacheservice.ports.resp.reply import CommandError
from cacheservice.ports.resp.requests import ProtocolViolation, RequestParser, integer
from cacheservice.ports.rotation import Look, no_files
from cacheservice.ports.throttle import LONG_WAIT_S, Throttle

COMMANDS_PER_TURN = 512
"""The most commands that one client may run before the other clients have their turn: about 0.5 ms."""
BYTES_PER_TURN = 256 * 1024
_MOST_QUEUED = 10_000
"""The most commands in one MULTI block."""
_MOST_MESSAGES = 1000
"""The most publishes that wait for a subscriber to read."""
_READ_AHEAD_BYTES = 64 * 1024
"""The most bytes read of a client that waits for a reply. Reading detects its disconnection."""

_CHANNEL_PREFIX = b"cache:"
_CROSS_PROTOCOL = (b"post", b"host:")
_WITHOUT_PASSWORD = (b"auth", b"hello", b"quit")
_WHILE_SUBSCRIBED = (b"subscribe", b"unsubscribe", b"ping", b"quit", b"reset")
_NOT_IN_MULTI = (b"subscribe", b"unsubscribe", b"auth", b"hello")
_OF_A_CLUSTER = (b"asking", b"cluster", b"readonly", b"readwrite")
"""Commands that some clients send first. They expect the refusal of a Redis server without cluster support."""
_NOT_QUEUED = (b"exec", b"discard", b"multi", b"quit", b"reset")
_NOAUTH = reply.error("NOAUTH Authentication required.")
_INTERNAL_ERROR = reply.error("ERR internal error; its traceback is in the log")
_WRONGPASS = reply.error("WRONGPASS invalid username-password pair or user is disabled.")
_PASSWORD = "resp.password"  # noqa: S105  # the name of the setting
_UNREAD_PASS = reply.error("WRONGPASS too many wrong passwords from this address, so this one was not looked at")


@implementer(IHalfCloseableProtocol, IPullProducer)
class RespProtocol(Protocol):
    """The connection of one client.

    Replies are written directly to the socket while it accepts them, because the transport's own path costs a turn of
    the reactor and two calls of epoll for each reply. The replies of all clients are written at the end of a turn, as
    in Redis: if each reply woke its client at once, most wake-ups would be in vain.

    Data that the socket does not accept is queued. Until the queue is empty, no more of this client's commands are read
    or run. So a client that does not read costs the replies of one turn, and is dropped after the idle time. A client
    that is only silent is kept; TCP keepalive detects dead peers.
    """

    transport: Any
    _log = Logger()

    def __init__(self, factory: RespFactory, number: int) -> None:
        self.factory: RespFactory = factory
        self.id = number
        self.protocol = 2
        self.name = b""
        self.in_transaction = False
        self.waiting = False
        self._library = {b"lib-name": b"", b"lib-ver": b""}
        self._parser = RequestParser()
        self._authenticated = not factory.commands.wants_password
        self._parser.authenticated = self._authenticated
        self._left: list[list[bytes]] = []
        self._queue: list[Words] | None = None
        self._queue_broken = False
        self._unsent: list[bytes] = []
        self._channels: set[bytes] = set()
        self._messages: list[bytes] = []
        # True if commands can run at once: no missing password, no MULTI, no subscription.
        self._plain = self._authenticated
        self._stream: Iterator[bytes] | None = None
        self._hold: Hold | None = None
        self._awaited: Deferred[Any] | None = None
        self._read_ahead_bytes = 0
        self._queued = False
        self._yielding: Any = None
        self._closing = False
        self._input_ended = False
        self._last_command = b""
        self._admitted = False
        self._connected_at = self._heard_at = factory.clock.seconds()
        self._idle_timer: DelayedCall | None = None

    # The connection

    def connectionMade(self) -> None:
        factory = self.factory
        factory.connections_received += 1
        # A small reply must not wait for the next one (Nagle's algorithm).
        self.transport.setTcpNoDelay(True)
        factory.clients.add(self)
        self._admitted = factory.door.admit(self, factory.max_connections)
        if not self._admitted:
            self.turn_away()
            return
        first_s = min(factory.idle_timeout_s, factory.silence_timeout_s or factory.idle_timeout_s)
        self._idle_timer = factory.clock.callLater(first_s, self._check_idle)

    def turn_away(self) -> None:
        """Refuse this client because there are too many; this port serves no probes."""
        factory = self.factory
        factory.rejected["too_many_connections"] += 1
        factory.door.note_refusal(factory.max_connections)
        self._closing = True
        self._flush([reply.error("ERR max number of clients reached")])
        self._close()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._closing = True
        if self._authenticated and self.factory.commands.wants_password:
            # Pools keep connections for hours, and may have to open all of them again at the same time.
            self.factory.throttle.succeeded(self._address, _PASSWORD)
        self.factory.door.left(self, was_admitted=self._admitted)
        self._stream = None
        self._release()
        self._unsent = []
        self.factory.clients.discard(self)
        for channel in self._channels:
            self.factory.unsubscribe(channel, self)
        self._channels.clear()
        if self._awaited is not None:
            self._awaited.cancel()
        for timer in (self._idle_timer, self._yielding):
            if timer is not None and timer.active():
                timer.cancel()

    def readConnectionLost(self) -> None:
        """Handle the end of the client's input.

        The client still gets its replies, except those that have to wait, as in Redis.
        """
        self._input_ended = True
        if self._awaited is not None:
            self.transport.abortConnection()
        elif not (self._queued or self._stream or self._awaited or self._yielding):
            self._close()

    def writeConnectionLost(self) -> None:
        """Do nothing: the service closes its side itself."""

    def dataReceived(self, data: bytes) -> None:
        if self._closing:
            return
        self._heard_at = self.factory.clock.seconds()
        try:
            self._parser.feed(data)
        except ProtocolViolation as violation:
            self._refuse(violation)
            return
        if not (self._queued or self._stream or self._awaited or self._yielding):
            self._work()
        elif self._awaited is not None:
            self._read_ahead_bytes += len(data)
            if self._read_ahead_bytes > _READ_AHEAD_BYTES:
                self.transport.pauseProducing()

    def _check_idle(self) -> None:
        factory = self.factory
        left_s = self._heard_at + self._patience_s() - factory.clock.seconds()
        if left_s <= 0:
            factory.rejected["slow_client"] += self._queued
            self.transport.abortConnection()
        else:
            self._idle_timer = factory.clock.callLater(min(left_s, factory.idle_timeout_s), self._check_idle)

    def _patience_s(self) -> float:
        """Return how long the client may send nothing in its present state."""
        factory = self.factory
        if self.waiting or (self._channels and not self._queued):
            return math.inf
        if self._queued or not self._authenticated or self._parser.is_within_request:
            return factory.idle_timeout_s
        return factory.silence_timeout_s or math.inf

    def drop_slow(self) -> str:
        """Abort a reply that is too slow and keeps superseded data in memory."""
        self.factory.rejected["slow_client"] += 1
        peer = self.transport.getPeer()
        self.transport.abortConnection()
        return f"{peer.host}:{peer.port}"

    def _release(self) -> None:
        if self._hold is not None:
            self.factory.held.end(self._hold)
            self._hold = None

    # Running commands

    def _work(self) -> None:
        """Run commands until the input is done, the turn is over, or one must wait."""
        try:
            batch = self._left or self._parser.take(COMMANDS_PER_TURN)
        except ProtocolViolation as violation:
            self._refuse(violation)
            return
        self._left = []
        out, size_bytes = self._hits(batch) if self._plain else ([], 0)
        commands = self.factory.commands
        by_word = commands.by_word
        for number, words in enumerate(batch[len(out) :] if out else batch, len(out) + 1):
            command = by_word.get(words[0]) if self._plain else None
            try:
                if command is not None and command.least <= len(words) <= command.most:
                    answer = command.run(commands, self, words)
                else:
                    answer = self._run_special(words)
            except CommandError as error:
                answer = reply.error(str(error))
            except Exception:
                self._log.failure("a command failed")
                answer = _INTERNAL_ERROR
            if answer.__class__ is not bytes:
                self._left = batch[number:]
                self._last_command = words[0]
                self.factory.commands_processed += number
                self._flush(out)
                self._begin(answer)
                return
            out.append(answer)
            size_bytes += len(answer)
            if self._closing or size_bytes >= BYTES_PER_TURN:
                self._left = batch[number:]
                break
        if batch:
            self._last_command = batch[-1][0]
            self.factory.commands_processed += len(batch) - len(self._left)
            self._flush_at_end_of_turn(out)
        # Nothing below may overtake these replies: `_flush` sends pending replies first.
        if self._closing:
            self._close()
        elif self._left or not self._parser.exhausted:
            self._yield()
        elif self._input_ended and not self._queued:
            self._close()

    def _hits(self, batch: list[list[bytes]]) -> tuple[list[bytes], int]:
        """Return the replies of `Commands.hits` that fit into a turn, and their size."""
        out = self.factory.commands.hits(batch)
        size_bytes = sum(map(len, out))
        if size_bytes >= BYTES_PER_TURN:
            size_bytes = 0
            for number, answer in enumerate(out, 1):
                size_bytes += len(answer)
                if size_bytes >= BYTES_PER_TURN:
                    self.factory.commands.uncount(batch[number : len(out)])
                    del out[number:]
                    break
        return out, size_bytes

    def _refuse(self, violation: ProtocolViolation) -> None:
        self.factory.rejected["protocol_error"] += 1
        self._closing = True
        self._flush([reply.error(f"ERR {violation}")])
        self._close()

    def _begin(self, answer: Reply) -> None:
        """Start an answer that is too large for this turn, or not ready yet."""
        if isinstance(answer, Deferred):
            self.waiting = True
            self._awaited, self._read_ahead_bytes = answer, 0
            answer.addCallbacks(self._arrived, self._failed)
        else:
            if isinstance(answer, Streamed):
                self._hold = self.factory.held.begin(self, answer.snapshots)
            self._stream = answer  # type: ignore[assignment]
            self._go_on()

    def _arrived(self, answer: Reply) -> None:
        self._awaited, self.waiting = None, False
        self._heard_at = self.factory.clock.seconds()
        if self._closing:
            return
        if isinstance(answer, bytes):
            self._flush([answer])
            # In the next turn: if many answers need no wait, each would add frames to the stack of the one before it.
            self._yield()
        else:
            self._begin(answer)

    def _failed(self, failure: Failure) -> None:
        self._awaited, self.waiting = None, False
        if self._closing and failure.check(CancelledError):
            return
        if failure.check(CommandError):
            self._arrived(reply.error(str(failure.value)))
            return
        self._log.failure("a command failed", failure)
        self._arrived(_INTERNAL_ERROR)

    def _go_on(self) -> None:
        """Continue with the streamed reply or the next commands.

        Called once the client has read the previous data.
        """
        self.flush()
        if self._closing or self._queued:
            return
        if self._stream is None:
            self._flush_messages()
            if not self._queued:
                self.transport.resumeProducing()
                self._work()
            return
        out: list[bytes] = []
        size_bytes = 0
        for piece in self._stream:
            out.append(piece)
            size_bytes += len(piece)
            # An empty piece marks work without output, which also counts as a step.
            if not piece or size_bytes >= BYTES_PER_TURN:
                break
        else:
            self._stream = None
            self._release()
        self._flush(out)
        if not self._queued:
            self._yield()

    def _yield(self) -> None:
        """Continue in the next turn, unless the client has to read first."""
        if self._queued or self._closing or self._yielding is not None:
            return
        self.transport.pauseProducing()
        self._yielding = self.factory.clock.callLater(0, self._next_turn)

    def _next_turn(self) -> None:
        self._yielding = None
        self._heard_at = self.factory.clock.seconds()
        self._go_on()

    # Output

    def _flush_at_end_of_turn(self, out: list[bytes]) -> None:
        if self._unsent:
            self._unsent += out
        elif out:
            self._unsent = out
            self.factory.flush_at_end_of_turn(self)

    def _flush(self, out: list[bytes]) -> None:
        if self._unsent:
            self._unsent += out
            self.flush()
        elif out:
            self._send(out)

    def flush(self) -> None:
        """Send the replies that were kept for the end of the turn."""
        if self._unsent:
            out, self._unsent = self._unsent, []
            self._send(out)

    def _send(self, out: list[bytes]) -> None:
        data = b"".join(out) if len(out) > 1 else out[0]
        if not self._queued:
            try:
                sent = self.transport.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._closing = True
                self.transport.abortConnection()
                return
            if sent == len(data):
                return
            data = data[sent:]
        self.transport.write(data)
        if not self._queued:
            # No more input is read until the client has read this.
            self._queued = True
            self.transport.pauseProducing()
            self._ignore_first = True
            self.transport.registerProducer(self, False)

    def resumeProducing(self) -> None:
        """Continue, because the transport's queue is empty.

        The first call is part of the registration and is ignored.
        """
        if self._ignore_first:
            self._ignore_first = False
            return
        self.transport.unregisterProducer()
        self._queued = False
        self._heard_at = self.factory.clock.seconds()
        if self._awaited is not None:
            self._flush_messages()
            if not self._queued:
                self.transport.resumeProducing()
        elif self._yielding is None:
            self._go_on()

    def stopProducing(self) -> None:
        """Do nothing: the connection has gone, and connectionLost follows."""

    def _close(self) -> None:
        """Close after all replies have been sent; read no more input."""
        self._closing = True
        self.flush()
        if self._queued:
            self.transport.unregisterProducer()
        self.transport.loseConnection()

    # Commands about the connection

    def _run_special(self, words: Words) -> Reply:
        """Run a command that the fast path cannot.

        It is about the connection itself, or its client has no password yet, is within MULTI, or has subscriptions.
        """
        name = words[0].lower()
        if name in _CROSS_PROTOCOL:
            # An HTTP request: an attacker may use a browser to send commands (as in Redis, CVE-2016-10517).
            self._closing = True
            self._log.warn("a request of another protocol came to the RESP port")
            self.factory.rejected["protocol_error"] += 1
            self.transport.abortConnection()
            return b""
        if not self._authenticated and name not in _WITHOUT_PASSWORD:
            return _NOAUTH
        if self._channels and self.protocol == 2 and name not in _WHILE_SUBSCRIBED:
            raise CommandError(
                f"ERR Can't execute '{_printable(name)}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET "
                "are allowed in this context"
            )
        if self._queue is not None and name not in _NOT_QUEUED:
            return self._enqueue(name, words)
        special = getattr(self, f"_do_{name.decode()}", None) if name.isalpha() and name.isascii() else None
        if special is not None:
            return special(words)  # type: ignore[no-any-return]
        commands = self.factory.commands
        return self._known(name, words, commands).run(commands, self, words)

    @staticmethod
    def _known(name: bytes, words: Words, commands: Commands) -> Command:
        """Return the command `name`.

        :raises CommandError: if it does not exist, or has the wrong number of words.
        """
        command = commands.by_name.get(name)
        if command is not None:
            if not command.least <= len(words) <= command.most:
                raise _wrong_number(command.name)
            return command
        if name in commands.writes:
            raise CommandError("READONLY this cache is read-only")
        if name in _OF_A_CLUSTER:
            raise CommandError("ERR This instance has cluster support disabled")
        raise CommandError(f"ERR unknown command '{_printable(words[0])}'")

    def _enqueue(self, name: bytes, words: Words) -> bytes:
        assert self._queue is not None
        try:
            if name in _NOT_IN_MULTI:
                raise CommandError(f"ERR {name.decode()} is not allowed in a transaction")
            if name != b"ping":
                self._known(name, words, self.factory.commands)
            if len(self._queue) >= _MOST_QUEUED:
                raise CommandError(f"ERR a transaction has at most {_MOST_QUEUED} commands")
        except CommandError:
            self._queue_broken = True
            raise
        self._queue.append(words)
        return reply.QUEUED

    def _do_ping(self, words: Words) -> Reply:
        if len(words) > 2:
            raise _wrong_number("ping")
        if self._channels and self.protocol == 2:
            return reply.encode([b"pong", words[1] if len(words) == 2 else b""], 2)
        return bulk(words[1]) if len(words) == 2 else reply.PONG

    def _do_quit(self, _: Words) -> Reply:
        self._closing = True
        return reply.OK

    def _expect_one_word(self, words: Words) -> None:
        if len(words) != 1:
            self._queue_broken = True
            raise _wrong_number(words[0].decode().lower())

    def _do_reset(self, words: Words) -> Reply:
        self._expect_one_word(words)
        for channel in list(self._channels):
            self._leave(channel)
        self.protocol, self.name, self._queue, self._queue_broken = 2, b"", None, False
        self._authenticated = not self.factory.commands.wants_password
        self._settle()
        return b"+RESET\r\n"

    def _do_auth(self, words: Words) -> Reply:
        if len(words) < 2:
            raise _wrong_number("auth")
        if len(words) > 3:
            raise CommandError(SYNTAX)
        if not self.factory.commands.wants_password:
            if len(words) == 2:
                raise CommandError(
                    "ERR AUTH <password> called without any password configured for the default user. "
                    "Are you sure your configuration is correct?"
                )
            return reply.OK if words[1] == b"default" else _WRONGPASS
        user = words[1] if len(words) == 3 else b"default"
        return self._authenticate(user, words[-1], lambda: reply.OK)

    def _authenticate(self, user: bytes, password: bytes, then: Any) -> Reply:
        """Check a password; delay the answer to a wrong one."""
        factory = self.factory
        is_full = factory.throttle.is_full(self._address)
        if is_full and not factory.throttle.is_proven(self._address, _PASSWORD):
            factory.rejected["auth_failed"] += 1
            return after(factory.clock, LONG_WAIT_S, lambda: _UNREAD_PASS)
        if factory.commands.accepts(user, password):
            return self._let_in(then)
        if is_full:
            return self._refuse_password(LONG_WAIT_S)
        # Counted first: otherwise guesses would be free while the file is read.
        wait_s = factory.throttle.failed(self._address)
        looking = factory.look()
        if looking is not None:
            return looking.addCallback(lambda _: self._authenticate_again(user, password, then, wait_s))
        return self._refuse_password(wait_s)

    def _authenticate_again(self, user: bytes, password: bytes, then: Any, wait_s: float) -> Reply:
        """Check a wrong password again after its file has been read."""
        if not self.factory.commands.accepts(user, password):
            return self._refuse_password(wait_s)
        self.factory.throttle.withdraw(self._address)
        return self._let_in(then)

    def _let_in(self, then: Any) -> Reply:
        self.factory.throttle.succeeded(self._address, _PASSWORD)
        self._authenticated = True
        self._settle()
        return then()  # type: ignore[no-any-return]

    def _refuse_password(self, wait_s: float) -> Reply:
        self.factory.rejected["auth_failed"] += 1
        return after(self.factory.clock, wait_s, lambda: _WRONGPASS)

    def _do_hello(self, words: Words) -> Reply:
        options = list(words[1:])
        protocol = self.protocol
        if options:
            version = integer(options.pop(0))
            if version is None:
                raise CommandError("ERR Protocol version is not an integer or out of range")
            if version not in (2, 3):
                raise CommandError("NOPROTO unsupported protocol version")
            protocol = version
        credentials, name = None, None
        while options:
            option = options.pop(0)
            if option.lower() == b"auth" and len(options) >= 2:
                credentials = (options.pop(0), options.pop(0))
            elif option.lower() == b"setname" and options:
                name = options.pop(0)
            else:
                raise CommandError(f"ERR Syntax error in HELLO option '{_printable(option)}'")

        def greet() -> bytes:
            if name is not None:
                self.set_name(name)
            self.protocol = protocol
            greeting = {
                "server": "redis",
                "version": REDIS_VERSION,
                "proto": protocol,
                "id": self.id,
                "mode": "standalone",
                "role": "master",
                "modules": [],
            }
            return reply.encode(greeting, protocol)

        if credentials is not None and self.factory.commands.wants_password:
            return self._authenticate(*credentials, greet)
        if credentials is not None and credentials[0] != b"default":
            return _WRONGPASS
        if not self._authenticated:
            raise CommandError(
                "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH "
                "<user> <pass> option can be used to authenticate the client and select the RESP protocol version at "
                "the same time"
            )
        return greet()

    def _do_multi(self, words: Words) -> Reply:
        self._expect_one_word(words)
        if self._queue is not None:
            raise CommandError("ERR MULTI calls can not be nested")
        self._queue, self._queue_broken = [], False
        self._settle()
        return reply.OK

    def _do_discard(self, words: Words) -> Reply:
        self._expect_one_word(words)
        if self._queue is None:
            raise CommandError("ERR DISCARD without MULTI")
        self._queue = None
        self._settle()
        return reply.OK

    def _do_exec(self, words: Words) -> Reply:
        """Run the queued commands on the snapshots of one moment.

        Commands that exceed this turn run in later ones, on the snapshots that are served now.
        """
        queue, self._queue = self._queue, None
        self._settle()
        if len(words) != 1:
            raise CommandError(
                "EXECABORT Transaction discarded because of: wrong number of arguments for 'exec' command"
            )
        if queue is None:
            raise CommandError("ERR EXEC without MULTI")
        if self._queue_broken:
            raise CommandError("EXECABORT Transaction discarded because of previous errors.")
        out = [reply.array_header(len(queue))]
        size_bytes = 0
        for number, each in enumerate(queue, 1):
            answer = self._run_queued(each, self.factory.commands)
            if isinstance(answer, bytes):
                out.append(answer)
                size_bytes += len(answer)
                if size_bytes < BYTES_PER_TURN and number % COMMANDS_PER_TURN:
                    continue
                answer = iter(())
            frozen = self.factory.commands.frozen()
            return Streamed(chain(out, answer, self._run_rest(queue[number:], frozen)), frozen.snapshots())
        return b"".join(out)

    def _run_rest(self, queue: list[Words], commands: Commands) -> Iterator[bytes]:
        for number, words in enumerate(queue, 1):
            answer = self._run_queued(words, commands)
            if isinstance(answer, bytes):
                yield answer
            else:
                yield from answer
            if not number % COMMANDS_PER_TURN:
                yield b""

    def _run_queued(self, words: Words, commands: Commands) -> bytes | Iterator[bytes]:
        self.in_transaction = True
        try:
            name = words[0].lower()
            answer = (
                self._do_ping(words)
                if name == b"ping"
                else self._known(name, words, commands).run(commands, self, words)
            )
            assert not isinstance(answer, Deferred), "nothing waits within MULTI"
            return answer
        except CommandError as error:
            return reply.error(str(error))
        except Exception:
            self._log.failure("a command failed")
            return _INTERNAL_ERROR
        finally:
            self.in_transaction = False

    def _do_subscribe(self, words: Words) -> Reply:
        if len(words) < 2:
            raise _wrong_number("subscribe")
        replies = []
        for channel in words[1:]:
            name = channel.removeprefix(_CHANNEL_PREFIX)
            if channel == name or name.decode("utf-8", "replace") not in self.factory.cache.datasets:
                raise CommandError(f"ERR unknown channel '{_printable(channel)}'; there is cache:NAME for each dataset")
        for channel in words[1:]:
            self._channels.add(channel)
            self.factory.subscribe(channel, self)
            replies.append(reply.push([b"subscribe", channel, len(self._channels)], self.protocol))
        self._settle()
        return b"".join(replies)

    def _do_unsubscribe(self, words: Words) -> Reply:
        replies = []
        leaving: list[bytes | None] = [*(words[1:] or sorted(self._channels))] or [None]
        for channel in leaving:
            if channel is not None:
                self._leave(channel)
            replies.append(reply.push([b"unsubscribe", channel, len(self._channels)], self.protocol))
        self._settle()
        return b"".join(replies)

    def _leave(self, channel: bytes) -> None:
        if channel in self._channels:
            self._channels.discard(channel)
            self.factory.unsubscribe(channel, self)

    def _settle(self) -> None:
        self._parser.authenticated = self._authenticated
        subscribed = bool(self._channels) and self.protocol == 2
        self._plain = self._authenticated and self._queue is None and not subscribed

    def send_message(self, channel: bytes, message: bytes) -> None:
        """Send a publish to a subscriber.

        A subscriber that does not read is dropped, as Redis does at its output limit.
        """
        if len(self._messages) >= _MOST_MESSAGES:
            self.factory.rejected["slow_client"] += 1
            self.transport.abortConnection()
            return
        self._messages.append(reply.push([b"message", channel, message], self.protocol))
        if not self._queued and self._stream is None:
            self._flush_messages()

    def _flush_messages(self) -> None:
        """Send the publishes that arrived during a reply."""
        messages, self._messages = self._messages, []
        self._flush(messages)

    # Attributes that CLIENT shows and sets

    @property
    def _address(self) -> str:
        return str(self.transport.getPeer().host)

    def set_name(self, name: bytes) -> None:
        """Set the client's name.

        :raises CommandError: for a name with blanks.
        """
        if any(character < 33 or character > 126 for character in name):
            raise CommandError("ERR Client names cannot contain spaces, newlines or special characters.")
        self.name = name

    def set_library(self, attribute: bytes, value: bytes) -> None:
        """Set lib-name or lib-ver.

        :raises CommandError: for another attribute, or blanks in the value.
        """
        if attribute not in self._library:
            raise CommandError(f"ERR Unrecognized option '{_printable(attribute)}'")
        if any(character < 33 or character > 126 for character in value):
            raise CommandError(f"ERR {attribute.decode()} cannot contain spaces, newlines or special characters.")
        self._library[attribute] = value

    def describe(self) -> bytes:
        """Return a line of CLIENT LIST."""
        peer, host = self.transport.getPeer(), self.transport.getHost()
        now = self.factory.clock.seconds()
        fields = {
            "id": self.id,
            "addr": f"{peer.host}:{peer.port}",
            "laddr": f"{host.host}:{host.port}",
            "name": self.name.decode(),
            "age": int(now - self._connected_at),
            "idle": int(now - self._heard_at),
            "flags": "b" if self.waiting else "P" if self._channels else "N",
            "db": 0,
            "sub": len(self._channels),
            "psub": 0,
            "multi": -1 if self._queue is None else len(self._queue),
            "cmd": _printable(self._last_command).lower(),
            "user": "default",
            "resp": self.protocol,
            "lib-name": self._library[b"lib-name"].decode(),
            "lib-ver": self._library[b"lib-ver"].decode(),
        }
        return " ".join(f"{name}={value}" for name, value in fields.items()).encode()


class RespFactory(ServerFactory):
    """Builds the protocol of the RESP port and keeps its clients.

    :param clock: `IReactorTime`, monotonic.
    :param idle_timeout_s: a client is dropped if it does not read its replies, or does not complete its request, within
        this time.
    :param silence_timeout_s: a client is dropped if it sends no request within this time; 0 for never.
    :param held: tracks the replies in progress; None for no limit.
    :param door: admits clients; None for a door that closes only at `max_connections`.
    :param look: reads the file of the password again.
    """

    noisy = False
    _log = Logger()

    def __init__(
        self,
        cache: Cache,
        commands: Commands,
        max_connections: int,
        idle_timeout_s: float,
        clock: Clock,
        door: Door | None = None,
        held: HeldSnapshots | None = None,
        silence_timeout_s: float = 0.0,
        *,
        look: Look = no_files,
    ) -> None:
        self.cache = cache
        self.commands = commands
        self.max_connections = max_connections
        self.idle_timeout_s = idle_timeout_s
        self.clock = clock
        self.clients: set[RespProtocol] = set()
        self.subscribers: dict[bytes, set[RespProtocol]] = defaultdict(set)
        self.throttle = Throttle(clock.seconds)
        self.look = look
        self.door = door or open_door(clock.seconds)
        self.held = held or Unlimited()
        self.silence_timeout_s = silence_timeout_s
        self.connections_received = 0
        self.rejected = rejected.none_yet()
        self.commands_processed = 0
        self._numbers = count(1)
        self._unsent: list[RespProtocol] = []
        self._end_of_turn: DelayedCall | None = None
        self._in_round = False
        # Subscriptions survive the removal of their dataset, and clients are notified again once it returns.
        cache.events.subscribe(self._published, Published)

    def buildProtocol(self, addr: object) -> RespProtocol:  # type: ignore[override]  # its `factory` has another type
        return RespProtocol(self, next(self._numbers))

    def flush_at_end_of_turn(self, client: RespProtocol) -> None:
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
                client.flush()
            except Exception:
                # Replies are missing, so the client must not wait for them.
                self._log.failure("replies could not be sent")
                client.transport.abortConnection()

    def close_clients(self) -> None:
        """Abort every connection now."""
        self._cancel_end_of_turn()
        self._unsent.clear()
        for client in list(self.clients):
            client.transport.abortConnection()

    def _cancel_end_of_turn(self) -> None:
        if is_active(self._end_of_turn):
            self._end_of_turn.cancel()
        self._end_of_turn = None

    def subscribe(self, channel: bytes, client: RespProtocol) -> None:
        self.subscribers[channel].add(client)

    def unsubscribe(self, channel: bytes, client: RespProtocol) -> None:
        self.subscribers[channel].discard(client)
        if not self.subscribers[channel]:
            del self.subscribers[channel]

    def _published(self, event: Event) -> None:
        dataset = self.cache.dataset(event.dataset)
        channel = _CHANNEL_PREFIX + dataset.name.encode()
        subscribers = self.subscribers.get(channel)
        if not subscribers or dataset.snapshot is None:
            return
        change = dataset.snapshot.change
        message = {
            "dataset": dataset.name,
            "generation": dataset.snapshot.generation,
            "as_of": iso(dataset.snapshot.as_of),
            "added": change.added if change else None,
            "changed": change.changed if change else None,
            "removed": change.removed if change else None,
        }
        text = json.dumps(message, separators=(",", ":")).encode()
        for client in list(subscribers):
            client.send_message(channel, text)


def _wrong_number(name: str) -> CommandError:
    return CommandError(f"ERR wrong number of arguments for '{name}' command")


def _printable(word: bytes) -> str:
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in word[:128].decode("utf-8", "backslashreplace")
    )
