"""A blocking client of the status port; every call has a timeout."""

from __future__ import annotations

import ipaddress
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from cacheservice import config
from cacheservice.base.errors import AddressUnknown, NoAnswer, Refused

ANSWER_TIMEOUT_S = 10.0
_DEFAULT_PORT = 8000
_REPLY_END = b"\n\n"


_IS_IT_RUNNING = "is the service running?"


class Address(NamedTuple):
    """The address of a port.

    As text it is HOST:PORT, with brackets around an IPv6 address.

    :param hint: the next step if the port does not answer.
    """

    host: str
    port: int
    hint: str = _IS_IT_RUNNING

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Connection:
    """A connection to a status port that stays open (`prompt`) between questions."""

    def __init__(self, address: Address, timeout_s: float = ANSWER_TIMEOUT_S, *, deadline_at: float = math.inf) -> None:
        """Connect, and keep the connection open.

        :param timeout_s: for each answer.
        :param deadline_at: for all answers together, on this machine's monotonic clock.
        :raises NoAnswer: if the port is closed, or does not answer in time.
        """
        self.address = address
        self._timeout_s = timeout_s
        self._deadline_at = deadline_at
        self._received = bytearray()
        with self._no_answer():
            self._socket = socket.create_connection(address[:2], timeout=timeout_s)
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

    def ask(self, question: str) -> str:
        """Return the reply without its ending.

        :raises NoAnswer: if it does not arrive in time; the connection must not be used any more.
        :raises Refused: if it begins with ERROR.
        """
        deadline_at = min(time.monotonic() + self._timeout_s, self._deadline_at)
        with self._no_answer():
            self._socket.settimeout(max(0.001, deadline_at - time.monotonic()))
            self._socket.sendall(f"{question}\n".encode())
            # An empty reply is only the empty line.
            while not self._received.startswith(b"\n") and _REPLY_END not in self._received:
                self._socket.settimeout(max(0.001, deadline_at - time.monotonic()))
                received = self._socket.recv(65536)
                if not received:
                    if self._received.startswith(b"ERROR"):  # too many connections: the service sends this and closes
                        raise Refused(_without_error(self._received.decode("utf-8", "replace")))
                    raise ConnectionResetError("the connection was closed")
                self._received += received
        end = 0 if self._received.startswith(b"\n") else self._received.index(_REPLY_END) + 1
        reply = self._received[:end].decode("utf-8", "replace").removesuffix("\n")
        del self._received[: end + 1]
        if reply.startswith("ERROR"):
            raise Refused(_without_error(reply))
        return reply

    @contextmanager
    def _no_answer(self) -> Iterator[None]:
        with no_answer_from(self.address):
            yield


@contextmanager
def no_answer_from(address: Address) -> Iterator[None]:
    """Turn errors of a socket into a `NoAnswer` that names the next step."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        hint = f"; {address.hint}" if address.hint else ""
        raise NoAnswer(f"no answer from {address}: {reason.lower()}{hint}") from error


def ask_once(address: Address, question: str, timeout_s: float) -> str:
    """Return the reply to a line of questions as `nc` would print it.

    This includes errors.

    :raises NoAnswer: if it does not arrive in time.
    """
    deadline_at = time.monotonic() + timeout_s
    reply = bytearray()
    with no_answer_from(address), socket.create_connection(address[:2], timeout=timeout_s) as connection:
        connection.sendall(f"{question}\n".encode())
        connection.shutdown(socket.SHUT_WR)
        while received := connection.recv(65536):
            reply += received
            connection.settimeout(max(0.001, deadline_at - time.monotonic()))
    return reply.decode("utf-8", "replace").removesuffix("\n")


class Answer(NamedTuple):
    """The port's `json`, as text and as an object; `taken_at` is on this machine's monotonic clock."""

    taken_at: float
    line: str
    facts: Mapping[str, Any]

    @property
    def datasets(self) -> Mapping[str, Mapping[str, Any]]:
        datasets: Mapping[str, Mapping[str, Any]] = self.facts["datasets"]
        return datasets


def ask_for_all(connection: Connection) -> Answer:
    """Ask for the whole status.

    :raises NoAnswer: if it does not arrive in time, or if the server is not a cacheservice.
    """
    line = connection.ask("json")
    taken_at = time.monotonic()
    try:
        facts = json.loads(line)
        if not facts["service"].keys() >= {"version", "ready"} or not isinstance(facts["datasets"], dict):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise NoAnswer(f"the server at {connection.address} is not a cacheservice; see --host and --port") from None
    return Answer(taken_at, line, facts)


def status_address(host: str | None, port: int | None, *, guess: bool = False) -> Address:
    """Return the first known address: options, configuration, 127.0.0.1:8000.

    The service may run with an older configuration than the file on disk. If that cannot be read, the default port is
    probably wrong, and a missing answer does not mean that the service is down.

    :param guess: whether to use the default even then.
    :raises AddressUnknown: if the port is neither given nor in a readable configuration.
    """
    seen = config.glance(os.environ)
    problem = None if port else seen.problem("status", "port")
    if port is None and problem is None and seen.status.port == 0:
        problem = "status.port is 0, any free port; the log names it in service_started"
    if problem is not None and not guess:
        raise AddressUnknown(f"{problem}; the status port is not known: use --port (and --host), or correct this first")
    if problem is None and host is None:
        problem = seen.problem("status", "host")
    if problem is not None:
        hint = f"it may listen elsewhere, see --host and --port: {problem}"
    elif seen.is_absent and host is None and port is None:
        hint = (
            f"{_IS_IT_RUNNING} The working directory has no {config.DEFAULT_FILE}; if it listens elsewhere, set "
            "CACHESERVICE_CONFIG, or use --host and --port"
        )
    else:
        hint = _IS_IT_RUNNING
    return Address(host or reachable(seen.status.host), port or seen.status.port or _DEFAULT_PORT, hint)


def reachable(host: str) -> str:
    """Return the address on this machine of a port that listens on `host`.

    A client cannot connect to "all addresses". All IPv6 addresses include all IPv4 ones; see
    `cacheservice.ports.listen.tcp`.
    """
    try:
        wildcard = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host
    return "127.0.0.1" if wildcard else host


def comma_hint(name: str) -> str:
    """Return an addition to the error for an unknown dataset that is a list."""
    return "; separate names by spaces" if "," in name else ""


def _without_error(reply: str) -> str:
    return reply.strip().removeprefix("ERROR ")
