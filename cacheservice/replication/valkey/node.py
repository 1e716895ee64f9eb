"""One connection to one server, which is opened when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import txredisapi  # type: ignore[import-untyped]  # ships no type information
from OpenSSL.SSL import Error as TlsError
from service_identity import VerificationError
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IHandshakeListener, ISSLTransport
from twisted.internet.protocol import Factory
from twisted.internet.ssl import optionsForClientTLS
from twisted.python.failure import Failure
from zope.interface import implementer

from cacheservice.base.interfaces import Reactor
from cacheservice.base.text import printable
from cacheservice.config.valkey_url import Address
from cacheservice.replication.valkey.errors import ValkeyDown, ValkeyRefused

Word = bytes | str | int


class Transport(Protocol):
    """The socket of a connection."""

    def abortConnection(self) -> object:
        """Close it at once."""


class Connection(Protocol):
    """A connection of the library.

    `connected` is 0 once it is lost.
    """

    connected: int
    transport: Transport

    @property
    def tls_problem(self) -> str:
        """Why TLS has ended the connection, or has not begun; empty if TLS works or is not used."""

    def execute_command(self, *words: Word, apply_timeout: bool = True) -> Deferred[Any]:
        """Send a command; fire with its reply, or a `txredisapi.RedisError`."""


_PASSING = frozenset({"CLUSTERDOWN", "LOADING", "MASTERDOWN", "TRYAGAIN", "BUSY", "READONLY", "UNKILLABLE", "MISCONF"})
"""Refusals that end by themselves, or with another server."""


class Login(NamedTuple):
    """How a connection begins.

    :param timeout_s: the most seconds that connecting, and each reply, may take.
    """

    user: str = ""
    password: str = ""
    database: int = 0
    tls: bool = False
    timeout_s: float = 2.0


class Redirected(Exception):
    """The node of a cluster names another one for the key.

    `asks` is whether only this command goes there.
    """

    def __init__(self, slot: int, node: Address, *, asks: bool) -> None:
        super().__init__()
        self.slot = slot
        self.node = node
        self.asks = asks


class Node:
    """A server. Commands of all callers share one connection, and their replies come in order.

    It is closed, opening or open. A connection that fails, or does not answer in time, is closed, and fails all its
    commands; the next command opens another one.
    """

    def __init__(self, address: Address, login: Login, reactor: Reactor) -> None:
        self.address = address
        self._login = login
        self._reactor = reactor
        self._protocol: Connection | None = None
        self._opening: list[Deferred[None]] | None = None
        self._attempt: Deferred[Connection] | None = None

    @property
    def name(self) -> str:
        """Host and port, for messages."""
        host, port = self.address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def run(self, *words: Word) -> Any:
        """Run a command and return its reply: None, an integer, bytes or a list of these.

        :raises ValkeyDown: if the server is not reached in time.
        :raises ValkeyRefused: if it refuses the command, or the login.
        :raises Redirected: if another node has the key.
        """
        await self._opened()
        return await self._run(*words)

    async def run_asked(self, *words: Word) -> Any:
        """Run a command for a slot that is being moved to this node; see `run`."""
        await self._opened()
        asking = Deferred.fromCoroutine(self._run("ASKING"))
        reply = Deferred.fromCoroutine(self._run(*words))
        await asking
        return await reply

    def close(self) -> None:
        """Close the connection; its commands fail."""
        if self._attempt is not None:
            self._attempt.cancel()
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            protocol.transport.abortConnection()

    async def _opened(self) -> None:
        if self._protocol is not None and self._protocol.connected:
            return
        if self._opening is not None:  # another command opens it
            opened: Deferred[None] = Deferred()
            self._opening.append(opened)
            await opened
            return
        self._opening = []
        problem: Exception | None = None
        try:
            self._protocol = await self.open(partial(_protocol, self._login.timeout_s))
        except Exception as error:
            # Another caller may be cancelled; those that wait for its connection are not.
            given_up = isinstance(error, CancelledError)
            problem = ValkeyDown(f"connecting to {self.name} was given up") if given_up else error
            raise
        finally:
            waiting, self._opening = self._opening, None
            for each in waiting:
                if problem is None:
                    each.callback(None)
                else:
                    each.errback(problem)

    async def open(self, protocol: Callable[[], Connection]) -> Connection:
        """Open a connection of its own; return its protocol, which is logged in.

        :raises ValkeyDown: if the server is not reached in time.
        :raises ValkeyRefused: if it refuses the login.
        """
        self._attempt = attempt = _cancellable(self._endpoint().connect(_Protocols(protocol)))
        try:
            opened: Connection = await attempt
        except CancelledError:
            raise
        except Exception as error:
            raise ValkeyDown(f"{self.name} cannot be reached: {_reason(error)}") from None
        finally:
            self._attempt = None
        login = self._login
        try:
            if login.password:
                await self._run_on(opened, "AUTH", *([login.user] if login.user else []), login.password)
            if login.database:
                await self._run_on(opened, "SELECT", login.database)
        except ValkeyRefused as error:
            opened.transport.abortConnection()
            code, settings = error.code, "the user, the password and the database in cluster.valkey_url"
            raise ValkeyRefused(f"{self.name} refused the login: {code}; check {settings}", code) from None
        return opened

    def _endpoint(self) -> Any:
        host, port = self.address
        endpoint: Any = HostnameEndpoint(cast("Any", self._reactor), host, port, timeout=self._login.timeout_s)
        return wrapClientTLS(optionsForClientTLS(host), endpoint) if self._login.tls else endpoint

    async def _run(self, *words: Word) -> Any:
        protocol = self._protocol
        if protocol is None:
            raise ValkeyDown(f"the connection to {self.name} is closed")
        return await self._run_on(protocol, *words)

    async def _run_on(self, protocol: Connection, *words: Word) -> Any:
        try:
            return await protocol.execute_command(*words)
        except txredisapi.ResponseError as error:
            raise self._refusal(str(error)) from None
        except txredisapi.RedisError as error:
            protocol.transport.abortConnection()
            raise ValkeyDown(f"{self.name}: {protocol.tls_problem or _reason(error)}") from None

    def _refusal(self, text: str) -> Exception:
        code, *rest = text.split(" ")
        if code in ("MOVED", "ASK") and len(rest) == 2 and rest[0].isdecimal():
            host, _, port = rest[1].rpartition(":")
            if port.isdecimal():
                return Redirected(int(rest[0]), (host or self.address[0], int(port)), asks=code == "ASK")
        message = f"{self.name} refused a command: {printable(text)}"
        return ValkeyDown(message) if code in _PASSING else ValkeyRefused(message, code)


class _Protocols(Factory):
    """Makes the connection of one attempt.

    The library's own factories reconnect and pool, which the cluster's redirections do not allow.
    """

    noisy = False
    isLazy = False

    def __init__(self, protocol: Callable[[], Connection]) -> None:
        self.protocol = protocol  # type: ignore[assignment]  # the library's protocols have no types


@implementer(IHandshakeListener)
class RemembersTls:
    """A protocol of the library that remembers its problem with TLS, which the errors of the library do not contain."""

    tls_problem = ""

    def connectionMade(self) -> None:
        if ISSLTransport.providedBy(self.transport):  # type: ignore[attr-defined]  # of the library
            self.tls_problem = "TLS failed: no handshake; a port without TLS needs redis:// in cluster.valkey_url"
        super().connectionMade()  # type: ignore[misc]  # of the library

    def handshakeCompleted(self) -> None:
        """TLS works."""
        self.tls_problem = ""

    def connectionLost(self, why: Failure) -> None:
        self.tls_problem = _tls_problem(why.value) or self.tls_problem
        super().connectionLost(why)  # type: ignore[misc]  # of the library


class _RedisProtocol(RemembersTls, txredisapi.RedisProtocol):  # type: ignore[misc]  # the library has no types
    pass


def _tls_problem(error: BaseException | None) -> str:
    """Return what is wrong with TLS, and the next step, if that ended a connection; empty otherwise."""
    if isinstance(error, VerificationError):
        return "TLS failed: its certificate is not for this name; use a name of the certificate in cluster.valkey_url"
    if not isinstance(error, TlsError) or not error.args or not isinstance(error.args[0], list):
        return ""
    reasons = ", ".join(str(reason[-1]) for reason in error.args[0])
    if "certificate verify failed" in reasons:
        return f"TLS failed: {reasons}; if its authority is not of the system, name its file in SSL_CERT_FILE"
    return f"TLS failed: {reasons}"


def _protocol(timeout_s: float) -> Connection:
    return cast("Connection", _RedisProtocol(charset=None, replyTimeout=timeout_s, convertNumbers=False))


def _cancellable(attempt: Deferred[Connection]) -> Deferred[Connection]:
    """Return the result of connecting; it fails with `CancelledError` if it is cancelled.

    A cancelled endpoint fails with other errors: ConnectingCancelledError, or while it looks the name up with
    DNSLookupError. The caller would take these for a server that is down, and go on.
    """
    is_cancelled = False

    def cancel(_: Deferred[Connection]) -> None:
        nonlocal is_cancelled
        is_cancelled = True
        attempt.cancel()

    connected: Deferred[Connection] = Deferred(cancel)

    def pass_on(result: Connection | Failure) -> None:
        if not is_cancelled:
            connected.callback(result)  # a failure as well
        elif not isinstance(result, Failure):
            result.transport.abortConnection()

    attempt.addBoth(pass_on)
    return connected


def _reason(error: BaseException) -> str:
    if isinstance(error, txredisapi.TimeoutError):
        return "it did not answer in time"
    text = str(error).strip().rstrip(".")
    return text[:1].lower() + text[1:] if text else type(error).__name__
