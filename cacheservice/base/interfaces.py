"""The interfaces of what other parts hand in: clocks, the reactor, loggers, sessions of the driver.

Twisted describes its own by zope.interface, which type checkers do not read. The reactor, and `task.Clock` in tests,
have what is declared here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""A value that JSON can express."""


class DelayedCall(Protocol):
    """A call that a clock will make: `IDelayedCall`."""

    def active(self) -> bool:
        """Return whether it is still to come."""

    def cancel(self) -> None:
        """Do not make it."""

    def getTime(self) -> float:
        """Return when it is to be made, on the clock of its owner."""

    def reset(self, seconds: float, /) -> None:
        """Make it after so many seconds from now instead."""


class Clock(Protocol):
    """A monotonic clock with timers: `IReactorTime`."""

    def seconds(self) -> float:
        """Return the time in seconds; only differences mean something."""

    def callLater(self, delay: float, callable: Callable[..., object], /, *args: object, **kw: object) -> DelayedCall:
        """Call after so many seconds, in a turn of the reactor of its own."""


class Reactor(Clock, Protocol):
    """The methods of Twisted's reactor that the service uses."""

    def addReader(self, reader: object, /) -> object:
        """Call `doRead` of an `IReadDescriptor` when its descriptor can be read."""

    def removeReader(self, reader: object, /) -> object:
        """Undo `addReader`."""

    def addWriter(self, writer: object, /) -> object:
        """Call `doWrite` of an `IWriteDescriptor` when its descriptor can be written."""

    def removeWriter(self, writer: object, /) -> object:
        """Undo `addWriter`."""

    def callFromThread(self, callable: Callable[..., object], /, *args: object, **kw: object) -> object:
        """Call in the reactor's thread; the one method that other threads may use."""

    def callWhenRunning(self, callable: Callable[..., object], /, *args: object, **kw: object) -> object:
        """Call once the reactor runs."""

    def addSystemEventTrigger(self, phase: str, eventType: str, callable: Callable[..., object], /) -> object:
        """Call before, during or after an event such as "shutdown"."""

    def spawnProcess(
        self,
        protocol: object,
        executable: str,
        /,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        childFDs: Mapping[int, int],
    ) -> Any:
        """Start a program with these descriptors; return its `IProcessTransport`."""

    def getThreadPool(self) -> Any:
        """Return the reactor's `ThreadPool`."""

    def listenUDP(self, port: int, protocol: object, /, interface: str = "") -> Any:
        """Bind a UDP port."""

    def listenUNIX(self, address: str, factory: object, /, backlog: int = 50, mode: int = 0o666) -> Any:
        """Listen on a unix socket."""


class Column(Protocol):
    """A column of a result, as the driver of PostgreSQL describes it."""

    name: str
    type_code: int
    table_oid: int | None
    table_column: int | None


class Cursor(Protocol):
    """The result of a statement, as the driver of PostgreSQL returns it.

    Values are of the types that the driver makes of PostgreSQL's; only the statement declares them.
    """

    description: Sequence[Column] | None
    rowcount: int
    rownumber: int

    def fetchone(self) -> Any:
        """Return the next row as a tuple; None after the last."""

    def fetchmany(self, size: int, /) -> list[Any]:
        """Return the next rows; an empty list after the last."""

    def fetchall(self) -> list[Any]:
        """Return the other rows."""

    def scroll(self, value: int, mode: str = "relative") -> object:
        """Move to another row."""


class BlockingCursor(Cursor, Protocol):
    """A cursor of the driver that sends statements and waits for the answers."""

    connection: BlockingConnection

    def execute(
        self, statement: object, parameters: Sequence[object] | Mapping[str, object] | None = None, /
    ) -> object:
        """Send a statement, as text or of the driver's parts, and wait for its result."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *failure: object) -> object: ...


class ConnectionInfo(Protocol):
    """The driver's information about a session."""

    backend_pid: int


class BlockingConnection(Protocol):
    """A session of the driver that waits for each answer.

    `closed` is 0 while it is open.
    """

    autocommit: bool
    closed: int
    server_version: int
    info: ConnectionInfo

    def cursor(self) -> BlockingCursor:
        """Return a cursor for the next statements."""

    def close(self) -> object:
        """End the session."""


class Log(Protocol):
    """A logger of events with fields, as structlog's."""

    def bind(self, **fields: object) -> Self:
        """Return a logger whose events have these fields, too."""

    def debug(self, event: str, **fields: object) -> object: ...

    def info(self, event: str, **fields: object) -> object: ...

    def warning(self, event: str, **fields: object) -> object: ...

    def error(self, event: str, **fields: object) -> object: ...
