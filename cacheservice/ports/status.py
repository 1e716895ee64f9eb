"""The status port: reads a line, sends the reply and closes the connection.

After `prompt` the connection stays open.

The admin socket speaks the same protocol and adds commands that change the service.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Coroutine, Sized
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import ServerFactory, connectionDone
from twisted.logger import Logger
from twisted.protocols.basic import LineReceiver
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure
from zope.interface import implementer

from cacheservice import __version__
from cacheservice.base.errors import CacheServiceError, ConfigError, UnknownDataset
from cacheservice.base.interfaces import Clock
from cacheservice.cache.cache import Cache, Refreshes, Reloaded
from cacheservice.cache.describe import in_short
from cacheservice.ports import rejected, report
from cacheservice.ports.admission import RESERVE_S, Door, open_door

MAX_LINE_BYTES = 256
_LINGER_S = 2.0
"""The time that a client has to close the connection after the last reply. If the service closed first with unread
input, it would send a reset that overtakes the reply (RFC 1122, 4.2.2.13)."""
_SHOWN_COMMAND_CHARACTERS = 40


class Commands:
    """The commands of a port.

    Each is a method that returns its reply without the line's end. Its docstring is its help text.

    :param refreshes: the target of the admin commands; None on the status port.
    :param reload: reads the configuration again, for the admin socket; its failure is a `CacheServiceError`.
    :param monitor: returns the lines of `mntr`.
    """

    def __init__(
        self,
        cache: Cache,
        refreshes: Refreshes | None = None,
        reload: Callable[[], Deferred[Reloaded]] | None = None,
        monitor: Callable[[], Coroutine[Any, Any, str]] | None = None,
    ) -> None:
        self._cache = cache
        self._refreshes = refreshes
        self._reload_now = reload
        self._monitor = monitor
        self._questions: dict[str, Callable[..., str | Deferred[str]]] = {
            "ruok": self._ruok,
            "ready": self._ready,
            "status": self._status,
            "json": self._json,
            "mntr": self._mntr,
            "show": self._show,
            "why": self._why,
            "version": self._version,
            "help": self._help,
        }
        self._changes: dict[str, Callable[..., str | Deferred[str]]] = {
            "refresh": self._refresh,
            "accept": self._accept,
            "pin": self._pin,
            "unpin": self._unpin,
            "rollback": self._rollback,
            "reload": self._reload,
        }

    def answer(self, command: str) -> str | Deferred[str]:
        """Return the reply to one command with its arguments, now or later.

        A reply that begins with ERROR reports a problem.
        """
        name, *arguments = command.split()
        method: Callable[..., str | Deferred[str]] | None = self._questions.get(name)
        if method is None and name in self._changes:
            if self._refreshes is None:
                return f"ERROR {name} is an admin command"
            method = self._changes[name]
        if method is None:
            return self._unknown_command(name)
        wanted = list(inspect.signature(method).parameters.values())
        required = [each for each in wanted if each.default is inspect.Parameter.empty]
        if not len(required) <= len(arguments) <= len(wanted):
            return f"ERROR {name} takes {_count(wanted, required)}: {_usage(name, method)}"
        try:
            return method(*arguments)
        except UnknownDataset:
            return self._unknown_dataset(arguments[0])
        except CacheServiceError as error:
            return f"ERROR {error}"

    def _ruok(self) -> str:
        """alive, nothing more: imok"""
        return "imok"

    def _ready(self) -> str:
        """ready, or notready and which required datasets are why"""
        return report.ready_line(self._cache)

    def _status(self, name: str = "") -> str:
        """a table for a person; with a name, of that dataset alone"""
        return report.status_table(self._cache, self._cache.dataset(name) if name else None)

    def _json(self) -> str:
        """everything, as one line of JSON"""
        return report.json_line(self._cache)

    def _mntr(self) -> str | Deferred[str]:
        """key<TAB>value lines for a collector"""
        if self._monitor is None:
            return "ERROR no metrics are collected here"
        return Deferred.fromCoroutine(self._monitor())

    def _show(self, name: str) -> str:
        """the fields of one dataset and its last 10 attempts"""
        return report.show(self._cache.dataset(name))

    def _why(self, name: str) -> str:
        """in sentences: the state of one dataset, what failed, who blocks it, what to do, when it tries next"""
        return report.why(self._cache.dataset(name), self._cache)

    def _version(self) -> str:
        """the version of this service"""
        return f"cacheservice {__version__}"

    def _help(self) -> str:
        """this text"""
        commands = self._questions | (self._changes if self._refreshes is not None else {})
        lines = {_usage(name, method): inspect.getdoc(method) for name, method in commands.items()}
        lines |= {"prompt": "keep the connection open", "quit": "close it", "A;B": "several commands on one line"}
        width = max(map(len, lines))
        return "\n".join(f"{command:{width}}  {text}" for command, text in lines.items())

    def _refresh(self, name: str) -> str:
        """start a refresh of one dataset, or of all"""
        assert self._refreshes is not None
        names = list(self._cache.datasets) if name == "all" else [self._cache.dataset(name).name]
        replies = []
        for each in names:
            started = self._refreshes.refresh_now(each)
            replies.append(f"OK {each}: refresh {'started' if started else 'follows the one that is running'}")
        return "\n".join(replies)

    def _accept(self, name: str) -> str:
        """publish the next result although a gate would hold it, once"""
        assert self._refreshes is not None
        self._refreshes.accept_next(self._cache.dataset(name).name)
        return f"OK {name}: the next result is published whatever the gates say; 'refresh {name}' reads it now"

    def _pin(self, name: str) -> str:
        """serve what is served now, whatever is read, until unpin"""
        assert self._refreshes is not None
        replies = [f"OK {each}: pinned, {self._served(each)}" for each in self._refreshes.pin(name)]
        return "\n".join(replies)

    def _unpin(self, name: str) -> str:
        """serve the newest result again, and those that come"""
        assert self._refreshes is not None
        replies = [f"OK {each}: not pinned, {self._served(each)}" for each in self._refreshes.unpin(name)]
        return "\n".join(replies)

    def _rollback(self, name: str) -> str:
        """serve the saved generation before the one that is served, pinned"""
        assert self._refreshes is not None
        replies = [
            f"OK {each}: going back to saved generation {generation}, which is then pinned; 'why {each}' tells when"
            for each, generation in self._refreshes.roll_back(name).items()
        ]
        return "\n".join(replies)

    def _reload(self) -> Deferred[str]:
        """re-read the configuration; the reply comes when it is in effect, or was refused"""
        assert self._reload_now is not None
        return self._reload_now().addCallbacks(_reloaded, _not_reloaded)

    def _served(self, name: str) -> str:
        snapshot = self._cache.dataset(name).snapshot
        return f"generation {snapshot.generation} is served" if snapshot else "nothing is loaded yet"

    def _unknown_command(self, name: str) -> str:
        if name in ("prompt", "quit"):
            return f"ERROR {name} takes no argument: {name}"
        known = [*self._questions, *(self._changes if self._refreshes is not None else ()), "prompt", "quit"]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean '{near[0]}'?" if near else "try help"
        return f"ERROR unknown command '{_shown(name)}'; {hint}"

    def _unknown_dataset(self, name: str) -> str:
        near = difflib.get_close_matches(name, list(self._cache.datasets), 1)
        hint = f"did you mean '{near[0]}'?" if near else "status lists them"
        return f"ERROR unknown dataset '{_shown(name)}'; {hint}"


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


def _reloaded(reloaded: Reloaded) -> str:
    datasets = reloaded.datasets
    counts = ", ".join(f"{len(names)} {fate}" for fate, names in datasets._asdict().items())
    rest = f"; at the next start: {', '.join(reloaded.needs_restart)}" if reloaded.needs_restart else ""
    return f"OK reloaded: {counts}{rest}; from {reloaded.file}"


def _not_reloaded(failure: Failure) -> str:
    failure.trap(CacheServiceError)
    error = failure.value
    if not isinstance(error, ConfigError):
        return f"ERROR {error}"
    # The first line is a summary; more lines follow only if it omits a problem.
    more = [] if len(error.problems) < 2 else list(error.problems)
    return "\n".join([f"ERROR {in_short(error.problems)}", *more])


def _count(wanted: Sized, required: Sized) -> str:
    if len(required) < len(wanted):
        return "at most one argument"
    return "one argument" if wanted else "no argument"


def _usage(name: str, method: Callable[..., Any]) -> str:
    """Return the command and its argument: show NAME, status [NAME]."""
    words = [
        each.name.upper() if each.default is inspect.Parameter.empty else f"[{each.name.upper()}]"
        for each in inspect.signature(method).parameters.values()
    ]
    return " ".join([name, *words])


def _shown(word: str) -> str:
    cut = word[:_SHOWN_COMMAND_CHARACTERS]
    return cut.encode("unicode_escape").decode()
