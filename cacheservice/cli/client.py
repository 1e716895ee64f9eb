"""A blocking client of the status port and of the admin socket; every call has a timeout."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

from cacheservice.base.errors import NoAnswer, Refused, UnknownDataset
from cacheservice.views import parse
from cacheservice.views.facts import Facts

ANSWER_TIMEOUT_S = 10.0
_LEAST_TIMEOUT_S = 0.001
"""A socket with a timeout of 0 would not block at all."""
_REPLY_END = b"\n\n"
_ERROR = "ERROR "


class Endpoint(Protocol):
    """Where a service listens. As text it is what a user would enter."""

    @property
    def hint(self) -> str:
        """The next step if it does not answer; empty for none."""

    def connect(self, timeout_s: float) -> socket.socket:
        """Return a connection.

        :raises OSError: if there is none in time.
        """


class Address(NamedTuple):
    """A TCP port. As text it is HOST:PORT, with brackets around an IPv6 address."""

    host: str
    port: int
    hint: str = "is the service running?"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def connect(self, timeout_s: float) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=timeout_s)


class UnixSocket(NamedTuple):
    """A unix socket, by its path."""

    path: str
    hint: str = "is the service running, and may you open its socket?"

    def __str__(self) -> str:
        return self.path

    def connect(self, timeout_s: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(timeout_s)
            connection.connect(self.path)
        except BaseException:
            connection.close()
            raise
        return connection


@contextmanager
def no_answer_from(endpoint: Endpoint) -> Iterator[None]:
    """Turn errors of a socket into a `NoAnswer` that names the next step."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        hint = f"; {endpoint.hint}" if endpoint.hint else ""
        raise NoAnswer(f"no answer from {endpoint}: {reason.lower()}{hint}") from error


def ask_once(endpoint: Endpoint, line: str, timeout_s: float) -> str:
    """Return the reply to a line of commands as `nc` would print it, without its last line's end.

    An ERROR is a reply as well.

    :raises NoAnswer: if the reply does not arrive in time.
    """
    deadline_at = time.monotonic() + timeout_s
    reply = bytearray()
    with no_answer_from(endpoint), endpoint.connect(timeout_s) as connection:
        connection.sendall(f"{line}\n".encode())
        connection.shutdown(socket.SHUT_WR)
        while received := connection.recv(65536):
            reply += received
            connection.settimeout(_left_s(deadline_at))
    return reply.decode("utf-8", "replace").removesuffix("\n")


class Connection:
    """A connection that stays open (`prompt`) between commands."""

    def __init__(
        self, endpoint: Endpoint, timeout_s: float = ANSWER_TIMEOUT_S, *, deadline_at: float = math.inf
    ) -> None:
        """Connect, and keep the connection open.

        :param timeout_s: for each reply.
        :param deadline_at: for all replies together, on this machine's monotonic clock.
        :raises NoAnswer: if the port is closed, or does not answer in time.
        """
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._deadline_at = deadline_at
        self._received = bytearray()
        with no_answer_from(endpoint):
            self._socket = endpoint.connect(timeout_s)
        try:
            self.ask("prompt")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, command: str) -> str:
        """Return the reply without its ending.

        :raises NoAnswer: if it does not arrive in time; the connection must not be used any more.
        :raises Refused: if it is an ERROR.
        """
        with no_answer_from(self.endpoint):
            reply = self._exchange(command)
        if reply.startswith(_ERROR):
            raise Refused(reply.removeprefix(_ERROR))
        return reply

    def _exchange(self, command: str) -> str:
        deadline_at = min(time.monotonic() + self._timeout_s, self._deadline_at)
        self._socket.settimeout(_left_s(deadline_at))
        self._socket.sendall(f"{command}\n".encode())
        # An empty reply is only the empty line.
        while not self._received.startswith(b"\n") and _REPLY_END not in self._received:
            self._socket.settimeout(_left_s(deadline_at))
            received = self._socket.recv(65536)
            if not received:
                rest = self._received.decode("utf-8", "replace").strip()
                if rest.startswith(_ERROR):  # too many connections: the service sends this and closes
                    return rest
                raise ConnectionResetError("the connection was closed")
            self._received += received
        end = 0 if self._received.startswith(b"\n") else self._received.index(_REPLY_END) + 1
        reply = self._received[:end].decode("utf-8", "replace").removesuffix("\n")
        del self._received[: end + 1]
        return reply


class Answer(NamedTuple):
    """The status of a service: the line of its JSON, and the facts in it.

    `taken_at` is on this machine's monotonic clock.
    """

    taken_at: float
    line: str
    facts: Facts


def read_status(connection: Connection, names: Sequence[str] = ()) -> Answer:
    """Ask for the whole status.

    :param names: the datasets that it must have.
    :raises NoAnswer: if it does not arrive in time, or if the server is not a cacheservice.
    :raises UnknownDataset: if it lacks one of the named datasets.
    """
    line = connection.ask("json")
    taken_at = time.monotonic()
    try:
        facts = parse.facts(line, datetime.now(UTC))
    except ValueError:
        raise NoAnswer(f"the server at {connection.endpoint} is not a cacheservice; see --host and --port") from None
    for name in names:
        if name not in facts.datasets:
            known = ", ".join(facts.datasets)
            raise UnknownDataset(f"unknown dataset {name!r}; there are {known}{comma_hint(name)}")
    return Answer(taken_at, line, facts)


def comma_hint(name: str) -> str:
    """Return an addition to the error for an unknown dataset that is a list."""
    return "; separate names by spaces" if "," in name else ""


def _left_s(deadline_at: float) -> float:
    return max(_LEAST_TIMEOUT_S, deadline_at - time.monotonic())
