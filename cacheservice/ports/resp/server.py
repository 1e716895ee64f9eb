"""The parts that the sessions of the RESP port share, and the form of a command."""

from __future__ import annotations

import enum
import hmac
import math
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from twisted.internet.defer import Deferred

from cacheservice.base import text
from cacheservice.base.errors import MainUnavailable
from cacheservice.cache.cache import Cache
from cacheservice.ports.client_socket import IpAddress
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.passwords import Passwords
from cacheservice.ports.rejected import Rejected
from cacheservice.ports.resp.command_docs import catalogue
from cacheservice.ports.resp.datasets import Datasets
from cacheservice.ports.resp.fast_get import FastGets
from cacheservice.ports.resp.reply import CommandError
from cacheservice.ports.resp.subscriptions import Subscriptions
from cacheservice.ports.resp.whole import Totals, Whole

REDIS_VERSION = "7.0.15"
"""The version in INFO and HELLO, whose behaviour this port follows."""
COMMANDS_PER_TURN = 512
"""The most commands that one client may run before the other clients have their turn: about 0.5 ms."""
PASSWORD = "resp.password"  # noqa: S105  # the name of the setting
_OF_A_CLUSTER = (b"asking", b"cluster", b"readonly", b"readwrite")
"""Commands that some clients send first. They expect the refusal of a Redis server without cluster support."""

T = TypeVar("T")
Words = Sequence[bytes]
Reply = bytes | Iterator[bytes] | Deferred[bytes] | Deferred[bytes | Iterator[bytes]]
"""Bytes; or an iterator if the reply is too large for one turn of the reactor (it keeps the snapshot with which it
began); or a Deferred if the reply has to wait."""


class Link(Protocol):
    """The connection of a session."""

    @property
    def is_waiting(self) -> bool:
        """Whether a reply is being prepared."""

    def age_s(self) -> float:
        """Return the seconds since the client connected."""

    def idle_s(self) -> float:
        """Return the seconds since the last progress."""

    def peer(self) -> IpAddress:
        """Return the address of the client."""

    def host(self) -> IpAddress:
        """Return the address of the port."""

    def deliver(self) -> None:
        """Send the messages of the session, now or after the reply in progress."""

    def drop_slow(self) -> object:
        """Abort the connection of a client that does not read."""


class Transaction:
    """A MULTI block: the queued commands, and whether one of them was refused."""

    __slots__ = ("is_broken", "queue")

    def __init__(self) -> None:
        self.queue: list[Words] = []
        self.is_broken = False

    def refuse(self) -> None:
        """Note that a command was refused, so that EXEC runs none of them."""
        self.is_broken = True


class Client(Protocol):
    """A session, as commands use it; see `cacheservice.ports.resp.state`."""

    id: int
    server: Server
    link: Link
    protocol: int
    name: bytes
    library_name: bytes
    library_version: bytes
    last_command: bytes
    channels: frozenset[bytes]
    transaction: Transaction | None
    in_transaction: bool

    @property
    def is_authenticated(self) -> bool: ...

    def let_in(self, host: str) -> None: ...

    def speak(self, protocol: int) -> None: ...

    def set_name(self, name: bytes) -> None: ...

    def set_library(self, *, name: bytes | None = None, version: bytes | None = None) -> None: ...

    def begin(self) -> None: ...

    def end_transaction(self) -> Transaction | None: ...

    def run_queued(self, words: Words, datasets: Datasets) -> Reply: ...

    def subscribe(self, channel: bytes) -> None: ...

    def unsubscribe(self, channel: bytes) -> None: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


class InMulti(enum.Enum):
    """The handling of a command within MULTI."""

    QUEUED = enum.auto()
    RUNS = enum.auto()
    REFUSED = enum.auto()


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its function, and when it may run.

    :param arity: as in Redis: the number of words including the name, negative for a minimum.
    :param without_password: whether it runs before AUTH.
    :param while_subscribed: whether it runs while the client has subscriptions in version 2 of the protocol.
    :param asks: whether a worker asks its main process for the reply, even within MULTI.
    """

    name: str
    run: Callable[[Datasets, Client, Words], Reply]
    arity: int
    without_password: bool = False
    while_subscribed: bool = False
    in_multi: InMulti = InMulti.QUEUED
    asks: bool = False
    least: int = field(init=False)
    most: float = field(init=False)

    def __post_init__(self) -> None:
        # Fields, because each command that is not a `FastGets` compares them.
        object.__setattr__(self, "least", abs(self.arity))
        object.__setattr__(self, "most", self.arity if self.arity > 0 else math.inf)


class Table:
    """The commands of the port.

    `by_word` has the spellings that clients use, so that most commands need one look-up.
    """

    def __init__(self, commands: Iterable[Command]) -> None:
        self.by_name: Mapping[bytes, Command] = {each.name.encode(): each for each in commands}
        self.by_word = {**self.by_name, **{name.upper(): each for name, each in self.by_name.items()}}
        self._writes = catalogue().writes

    def find(self, name: bytes, words: Words) -> Command:
        """Return the command `name`, in lower case.

        :raises CommandError: if it does not exist, or has the wrong number of words.
        """
        command = self.by_name.get(name)
        if command is not None:
            if not command.least <= len(words) <= command.most:
                raise wrong_number(command.name)
            return command
        if name in self._writes:
            raise CommandError("READONLY this cache is read-only")
        if name in _OF_A_CLUSTER:
            raise CommandError("ERR This instance has cluster support disabled")
        raise CommandError(f"ERR unknown command '{printable(words[0])}'")


class Password:
    """The password of the port, empty for none."""

    def __init__(self, password: str) -> None:
        self._password = password.encode()

    @property
    def is_required(self) -> bool:
        return bool(self._password)

    def accepts(self, user: bytes, password: bytes) -> bool:
        """Return True if a client may read as `user`.

        The time of the comparison does not depend on the password.
        """
        right = hmac.compare_digest(password, self._password)
        return right and user == b"default"

    def replace(self, password: str) -> None:
        """Accept only this password from now on. Authenticated clients remain so."""
        self._password = password.encode()


class PortStatus(Protocol):
    """The limit and the counters of the port, for INFO."""

    max_connections: int
    rejected: Rejected


class Server:
    """The objects that all sessions of a port share.

    `sessions` are the connected clients by id. `whole` asks for facts about all processes of the service; it is None if
    this process is the whole service.

    :param port: its factory, whose `rejected` counts refused clients.
    :param passwords: slows guesses of `password`.
    """

    def __init__(
        self,
        *,
        table: Table,
        cache: Cache,
        freshness: Freshness,
        password: Password,
        passwords: Passwords,
        port: PortStatus,
    ) -> None:
        self.table = table
        self.cache = cache
        self.freshness = freshness
        self.password = password
        self.passwords = passwords
        self.port = port
        self.datasets = Datasets(cache)
        self.fast = FastGets(cache)
        self.subscriptions = Subscriptions(cache)
        self.sessions: dict[int, Client] = {}
        self.connections_received = 0
        self.commands_processed = 0
        self.whole: Whole | None = None
        self._asking: set[int] = set()

    def join(self, whole: Whole) -> None:
        """Be a part of a service that has other processes."""
        self.whole = whole

    async def ask(self, client: Client, coming: Deferred[T]) -> T:
        """Return the answer of the main process to a command of `client`.

        :raises CommandError: if the main process does not answer.
        """
        self._asking.add(client.id)
        try:
            return await coming
        except MainUnavailable as error:
            raise CommandError(f"ERR {error}") from None
        finally:
            self._asking.discard(client.id)

    def is_blocked(self, client: Client) -> bool:
        """Return whether the command of `client` waits for an event."""
        return client.link.is_waiting and client.id not in self._asking

    def totals(self) -> Totals:
        """Return the counts and the usage of this process."""
        counts = Totals(
            clients=len(self.sessions),
            blocked=sum(map(self.is_blocked, self.sessions.values())),
            connections_received=self.connections_received,
            commands_processed=self.commands_processed,
            rejected=self.port.rejected["too_many_connections"],
            channels=frozenset(channel.decode() for channel in self.subscriptions.channels),
        )
        return counts + own_usage()

    def connected(self, client: Client) -> None:
        """Add a client."""
        self.connections_received += 1
        self.sessions[client.id] = client

    def left(self, client: Client) -> None:
        """Remove a client."""
        self.sessions.pop(client.id, None)

    def count_commands(self, number: int) -> None:
        """Count commands that have run."""
        self.commands_processed += number


def own_usage() -> Totals:
    """Return the usage of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm", "rb") as statm:
        resident_bytes = int(statm.read().split()[1]) * resource.getpagesize()
    return Totals(
        resident_bytes=resident_bytes,
        peak_bytes=usage.ru_maxrss * 1024,
        user_s=usage.ru_utime,
        system_s=usage.ru_stime,
    )


def wrong_number(name: str) -> CommandError:
    """Return the error for a wrong number of words."""
    return CommandError(f"ERR wrong number of arguments for '{name}' command")


def printable(word: bytes) -> str:
    """Return a word of a client as printable text, at most 128 bytes of it."""
    return text.printable(word[:128].decode("utf-8", "backslashreplace"))
