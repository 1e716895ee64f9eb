"""Where to connect: a libpq connection string, read once and kept out of every message."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg2
from psycopg2 import extensions

_DEFAULT_PORT = "5432"
_NOT_SUPPORTED = {
    "service": "name host, port, user and dbname instead",
    "hostaddr": "give the address as host",
}
_IDENTIFIER_BYTES = 63
"""PostgreSQL cuts application_name at this length."""

Resolve = Callable[[str], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed connection string. Its repr shows nothing of it."""

    _parameters: Mapping[str, str] = field(repr=False)

    async def connect_arguments(self, resolve: Resolve, purpose: str) -> dict[str, Any]:
        """Arguments for `psycopg2.connect`, every name in it resolved.

        libpq resolves names with a blocking call, so each is given its address in `hostaddr`;
        `host` stays for the verification of certificates (libpq manual, 32.1.1).

        :param purpose: shown in `application_name`, so that pg_stat_activity names it.
        """
        parameters: dict[str, Any] = dict(self._parameters)
        hosts = (parameters.get("host") or os.environ.get("PGHOST") or "").split(",")
        ports = (parameters.get("port") or os.environ.get("PGPORT") or _DEFAULT_PORT).split(",")
        if len(ports) == 1:
            ports = ports * len(hosts)
        expanded = [
            (host, address, port)
            for host, port in zip(hosts, ports, strict=True)
            for address in (await resolve(host) if _is_name(host) else [host if _is_address(host) else ""])
        ]
        parameters["host"] = ",".join(host for host, _, _ in expanded)
        parameters["port"] = ",".join(port for _, _, port in expanded)
        if any(address for _, address, _ in expanded):
            parameters["hostaddr"] = ",".join(address for _, address, _ in expanded)
        parameters["application_name"] = self.application_name(purpose)
        # Kerberos would block; the documents must be UTF-8 whatever the database's encoding is.
        return parameters | {"gssencmode": "disable", "client_encoding": "UTF8"}

    def application_name(self, purpose: str, attempt: str = "") -> str:
        """What pg_stat_activity shows of a session, and while it works for an attempt, the id of that at the end."""
        ending = f" {attempt}" if attempt else ""
        name = f"{self._parameters.get('application_name', 'cacheservice')} {purpose}"
        return name[: _IDENTIFIER_BYTES - len(ending)] + ending

    @property
    def has_password(self) -> bool:
        return "password" in self._parameters

    def redact(self, text: str) -> str:
        """`text` in one line and without the password."""
        password = self._parameters.get("password")
        if password:
            text = text.replace(password, "***")
        return " ".join(text.split())


def parse(dsn: str) -> Target:
    """:raises ValueError: with one line that does not show the DSN."""
    try:
        parameters = extensions.parse_dsn(dsn)
    except (psycopg2.Error, TypeError, ValueError):
        # libpq's own message quotes the string, and with it the password.
        raise ValueError(
            "not a libpq connection string; write postgresql://USER@HOST:5432/DATABASE or host=… dbname=… user=…"
        ) from None
    for name, instead in _NOT_SUPPORTED.items():
        if name in parameters:
            raise ValueError(f"{name}= is not supported; {instead}")
    hosts, ports = parameters.get("host", "").split(","), parameters.get("port", _DEFAULT_PORT).split(",")
    if len(ports) not in (1, len(hosts)):
        raise ValueError(f"{len(ports)} ports for {len(hosts)} hosts; give one, or one for each host")
    if not all(port == "" or (port.isascii() and port.isdigit() and 0 < int(port) < 65536) for port in ports):
        raise ValueError("a port must be a number from 1 to 65535")
    return Target(parameters)


def problem(dsn: str) -> str | None:
    """What is wrong with a DSN, in a line that does not show it; None if nothing is."""
    try:
        parse(dsn)
    except ValueError as error:
        return str(error)
    return None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_name(host: str) -> bool:
    # libpq: empty is the default unix socket, a path or @abstract names one.
    return bool(host) and not host.startswith(("/", "@")) and not _is_address(host)
