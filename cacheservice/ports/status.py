"""The status port: reads a line, sends the reply and closes the connection.

After `prompt` the connection stays open.

The admin socket speaks the same protocol and adds commands that change the service.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Coroutine, Sequence, Sized
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice import __version__
from cacheservice.base.errors import CacheServiceError, ConfigError, UnknownDataset
from cacheservice.base.interfaces import Clock
from cacheservice.cache.cache import Cache, Refreshes, Reloaded
from cacheservice.cache.describe import in_short
from cacheservice.ports import report
from cacheservice.ports.client_socket import ENDING, READING, WAITING, YIELDED
from cacheservice.ports.clients import ClientFactory, Limits
from cacheservice.ports.connection import Connection

MAX_LINE_BYTES = 256
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
            self._say(f"ERROR too many connections, the limit is {self.factory.max_connections}")
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
                self._say(f"ERROR the line is longer than {MAX_LINE_BYTES} bytes")
                self.finish()
                return
            self._commands = [
                command for part in line.decode("utf-8", "replace").split(";") if (command := part.strip())
            ]
            if not self._commands:
                self._say("ERROR no command; try help")
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
                self._say("")
                continue
            answer = self._answer(command)
            if isinstance(answer, Deferred):
                self.wait_for(answer, self._arrived, self._failed)
                if self.phase is WAITING:
                    self.transport.pauseProducing()
                return
            self._say(answer)
            if self.phase is not READING:
                return  # the connection has been lost
        if self._prompting and (self._input or not self.input_ended):
            self.yield_turn()
        else:
            self.finish()

    def _arrived(self, reply: str) -> None:
        """Send a reply that was not ready, then continue with the line."""
        self._say(reply)
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

    def _say(self, reply: str) -> None:
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
