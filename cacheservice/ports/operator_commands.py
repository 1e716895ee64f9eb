"""The commands of the status port, and those of the admin socket."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Coroutine, Mapping
from enum import Enum
from typing import NamedTuple

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice import __version__
from cacheservice.base.errors import CacheServiceError, ConfigError, UnknownDataset
from cacheservice.base.text import in_short
from cacheservice.cache.cache import Cache, Refreshes, Reloaded
from cacheservice.views import collect, table
from cacheservice.views import json as as_json
from cacheservice.views.why import sentences

Reply = str | Deferred[str]
"""A reply without the line's end, now or later. One that begins with ERROR reports a problem."""
Monitor = Callable[[], Coroutine[Deferred[object], object, str]]

_SHOWN_CHARACTERS = 40


class Argument(Enum):
    """The arguments of a command, as the help and errors show them."""

    NONE = ("", "no argument")
    NAME = (" NAME", "one argument")
    OPTIONAL_NAME = (" [NAME]", "at most one argument")

    def accepts(self, count: int) -> bool:
        """Return whether a command may have this many arguments."""
        return count == 1 if self is Argument.NAME else count <= (self is Argument.OPTIONAL_NAME)


class Command(NamedTuple):
    """A command: its argument, its line in `help`, and the function that returns its reply.

    The function takes the argument; the empty string if there is none.
    """

    argument: Argument
    help: str
    reply: Callable[[str], Reply]


class Commands:
    """The commands of a port, by name.

    :param refreshes: the target of the admin commands; None on the status port.
    :param reload: reads the configuration again, for the admin socket; its failure is a `CacheServiceError`.
    :param monitor: returns the lines of `mntr`.
    """

    def __init__(
        self,
        cache: Cache,
        refreshes: Refreshes | None = None,
        reload: Callable[[], Deferred[Reloaded]] | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self._cache = cache
        help_command = Command(Argument.NONE, "this list", lambda _: self._help())
        self._commands = {**_questions(cache, monitor), "help": help_command}
        if refreshes is not None:
            self._commands |= AdminCommands(cache, refreshes, reload).table

    def answer(self, line: str) -> Reply:
        """Return the reply to one command with its arguments."""
        name, *arguments = line.split()
        command = self._commands.get(name)
        if command is None:
            return self._unknown_command(name)
        if not command.argument.accepts(len(arguments)):
            usage, takes = command.argument.value
            return f"ERROR {name} takes {takes}: {name}{usage}"
        argument = arguments[0] if arguments else ""
        try:
            return command.reply(argument)
        except UnknownDataset:
            return self._unknown_dataset(argument)
        except CacheServiceError as error:
            return f"ERROR {error}"

    def _help(self) -> str:
        lines = {f"{name}{command.argument.value[0]}": command.help for name, command in self._commands.items()}
        lines |= {
            "prompt": "keep the connection open",
            "quit": "close the connection",
            "A;B": "several commands on one line",
        }
        width = max(map(len, lines))
        return "\n".join(f"{usage:{width}}  {text}" for usage, text in lines.items())

    def _unknown_command(self, name: str) -> str:
        if name in ADMIN_COMMANDS:
            return f"ERROR {name} is an admin command"
        if name in ("prompt", "quit"):
            return f"ERROR {name} takes no argument: {name}"
        near = difflib.get_close_matches(name, [*self._commands, "prompt", "quit"], 1)
        hint = f"did you mean '{near[0]}'?" if near else "try help"
        return f"ERROR unknown command '{_shown(name)}'; {hint}"

    def _unknown_dataset(self, name: str) -> str:
        near = difflib.get_close_matches(name, list(self._cache.datasets), 1)
        hint = f"did you mean '{near[0]}'?" if near else "status lists them"
        return f"ERROR unknown dataset '{_shown(name)}'; {hint}"


def _questions(cache: Cache, monitor: Monitor | None) -> Mapping[str, Command]:
    """Return the commands that only look."""

    def status(name: str) -> str:
        datasets = [cache.dataset(name)] if name else cache.datasets.values()
        return table.status_table(collect.service(cache), collect.database(cache), map(collect.dataset, datasets))

    def mntr(_: str) -> Reply:
        if monitor is None:
            return "ERROR no metrics are collected here"
        return Deferred.fromCoroutine(monitor())

    def show(name: str) -> str:
        return table.show(collect.details(cache.dataset(name), cache))

    def why(name: str) -> str:
        details = collect.details(cache.dataset(name), cache)
        return "\n".join(sentences(details, collect.database(cache), collect.rejection(cache)))

    nothing, name, optional_name = Argument.NONE, Argument.NAME, Argument.OPTIONAL_NAME
    return {
        "ruok": Command(nothing, "imok, if the process is alive", lambda _: "imok"),
        "ready": Command(
            nothing,
            "ready, or notready and the required datasets that cannot be read",
            lambda _: table.ready_line(collect.service(cache)),
        ),
        "status": Command(optional_name, "a table of all datasets, or the line of one, for people", status),
        "json": Command(nothing, "everything, as one line of JSON", lambda _: as_json.line(collect.everything(cache))),
        "mntr": Command(nothing, "key<TAB>value lines, for a collector of metrics", mntr),
        "show": Command(name, "the fields of one dataset and its last 10 attempts", show),
        "why": Command(
            name, "one dataset in sentences: its state, the last failure, what to do, the next attempt", why
        ),
        "version": Command(nothing, "the version of this service", lambda _: f"cacheservice {__version__}"),
    }


class AdminCommands:
    """The commands that change the service, in `table` by name."""

    def __init__(self, cache: Cache, refreshes: Refreshes, reload: Callable[[], Deferred[Reloaded]] | None) -> None:
        self._cache = cache
        self._refreshes = refreshes
        self._reload_now = reload
        name = Argument.NAME
        self.table: Mapping[str, Command] = {
            "refresh": Command(name, "start a refresh of one dataset; of all with `refresh all`", self._refresh),
            "accept": Command(name, "publish the next result even if a gate refuses it, once", self._accept),
            "pin": Command(name, "keep serving the current snapshot until unpin; refreshes continue", self._pin),
            "unpin": Command(name, "serve the newest result again, and those that follow", self._unpin),
            "rollback": Command(name, "serve the saved generation before the served one, and pin it", self._roll_back),
            "reload": Command(
                Argument.NONE,
                "read the configuration again; the reply comes when it is in effect or refused",
                self._reload,
            ),
        }

    def _refresh(self, name: str) -> str:
        names = list(self._cache.datasets) if name == "all" else [self._cache.dataset(name).name]
        replies = []
        for each in names:
            started = self._refreshes.refresh_now(each)
            replies.append(f"OK {each}: refresh {'started' if started else 'follows the one that is running'}")
        return "\n".join(replies)

    def _accept(self, name: str) -> str:
        self._refreshes.accept_next(self._cache.dataset(name).name)
        return f"OK {name}: the next result is published even if a gate refuses it; 'refresh {name}' reads it now"

    def _pin(self, name: str) -> str:
        return "\n".join(f"OK {each}: pinned, {self._served(each)}" for each in self._refreshes.pin(name))

    def _unpin(self, name: str) -> str:
        return "\n".join(f"OK {each}: not pinned, {self._served(each)}" for each in self._refreshes.unpin(name))

    def _roll_back(self, name: str) -> str:
        return "\n".join(
            f"OK {each}: going back to saved generation {generation}, which is then pinned; 'why {each}' shows when"
            for each, generation in self._refreshes.roll_back(name).items()
        )

    def _reload(self, _: str) -> Reply:
        if self._reload_now is None:
            return "ERROR the configuration cannot be reloaded here"
        return self._reload_now().addCallbacks(_reloaded, _not_reloaded)

    def _served(self, name: str) -> str:
        snapshot = self._cache.dataset(name).snapshot
        return f"generation {snapshot.generation} is served" if snapshot else "nothing is loaded yet"


ADMIN_COMMANDS = frozenset({"refresh", "accept", "pin", "unpin", "rollback", "reload"})


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


def _shown(word: str) -> str:
    return word[:_SHOWN_CHARACTERS].encode("unicode_escape").decode()
