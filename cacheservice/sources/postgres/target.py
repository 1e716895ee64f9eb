"""A libpq connection string, read once and kept out of every message."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import psycopg2
from psycopg2 import extensions

from cacheservice.sources.postgres.addresses import Address

_DEFAULT_PORT = "5432"
_NOT_SUPPORTED = {
    "service": "name host, port, user and dbname instead",
    "hostaddr": "set the address as host",
}
_IDENTIFIER_BYTES = 63
"""PostgreSQL truncates application_name at this length."""

_OF_THE_CHOICE = ("connect_timeout", "load_balance_hosts")
"""Parameters for choosing between several addresses, which the connector does instead of libpq."""

_SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, Red Hat
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # macOS, BSD
)

_SECRET = ("password", "sslpassword")
_LONG_PASSWORD = 8
_WORD_PASSWORD = 4

Resolve = Callable[[str], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed connection string. Its repr shows none of it."""

    _parameters: Mapping[str, str] = field(repr=False)

    def hosts(self) -> list[tuple[str, str]]:
        """Return the hosts and ports to try, in the order of the connection string."""
        hosts = self._value("host", "PGHOST").split(",")
        ports = (self._value("port", "PGPORT") or _DEFAULT_PORT).split(",")
        if len(ports) == 1:
            ports = ports * len(hosts)
        return [(host, port or _DEFAULT_PORT) for host, port in zip(hosts, ports, strict=True)]

    @property
    def session_attrs(self) -> str:
        """Return target_session_attrs: the kind of session that is acceptable."""
        return self._value("target_session_attrs", "PGTARGETSESSIONATTRS") or "any"

    @property
    def random_order(self) -> bool:
        """Return load_balance_hosts: whether addresses are tried in random order."""
        return self._value("load_balance_hosts", "PGLOADBALANCEHOSTS") == "random"

    @property
    def connect_timeout_s(self) -> float | None:
        """Return connect_timeout, the limit for each address; None without a limit.

        libpq applies it to each address, too.
        """
        try:
            seconds = int(self._value("connect_timeout", "PGCONNECT_TIMEOUT") or "0")
        except ValueError:
            return None
        return float(seconds) if seconds > 0 else None

    def connect_arguments(self, address: Address, session_attrs: str, purpose: str) -> dict[str, object]:
        """Return the arguments of `psycopg2.connect` for one address.

        libpq resolves names with a blocking call, so `hostaddr` holds the address; `host` stays for the verification of
        certificates (libpq manual, 34.1.2). In asynchronous mode libpq would wait for the first of several addresses
        without a limit, so it gets one address.

        :param purpose: shown in `application_name`, so that pg_stat_activity names it.
        """
        parameters = {name: value for name, value in self.blocking_arguments().items() if name not in _OF_THE_CHOICE}
        parameters |= {"host": address.host, "port": address.port, "target_session_attrs": session_attrs}
        if address.address:
            parameters["hostaddr"] = address.address
        parameters["application_name"] = self.application_name(purpose)
        # Kerberos would block; the documents must be UTF-8 whatever the database's encoding is.
        return parameters | {"gssencmode": "disable", "client_encoding": "UTF8"}

    def blocking_arguments(self) -> dict[str, object]:
        """Return the arguments for a blocking `psycopg2.connect`.

        They are the connection string, and libpq chooses between the addresses itself. sslrootcert=system becomes the
        system's bundle, because the OpenSSL in the driver's wheel looks in a directory of its build machine.
        """
        parameters: dict[str, object] = dict(self._parameters)
        if self._value("sslrootcert", "PGSSLROOTCERT") == "system":
            bundle = next(filter(os.path.exists, (os.environ.get("SSL_CERT_FILE", ""), *_SYSTEM_BUNDLES)), None)
            if bundle is not None:
                parameters |= {"sslrootcert": bundle, "sslmode": "verify-full"}
        return parameters

    def application_name(self, purpose: str, attempt: str = "") -> str:
        """Return the application_name of a session, as pg_stat_activity shows it.

        While the session works for an attempt, the name ends with the attempt's id.
        """
        ending = f" {attempt}" if attempt else ""
        name = f"{self._parameters.get('application_name', 'cacheservice')} {purpose}"
        return name[: _IDENTIFIER_BYTES - len(ending)] + ending

    def _value(self, name: str, variable: str) -> str:
        return self._parameters.get(name) or os.environ.get(variable) or ""

    @property
    def has_password(self) -> bool:
        return "password" in self._parameters

    def redact(self, text: str) -> str:
        """Return `text` in one line and without the password.

        A short password is removed only from places where a password may stand, because its letters are also part of
        other words.
        """
        for name in _SECRET:
            password = self._parameters.get(name)
            if password:
                for each in {password, quote(password, safe="")}:
                    text = _secret_places(each).sub("***", text)
        return " ".join(text.split())


def _secret_places(password: str) -> re.Pattern[str]:
    secret = re.escape(password)
    if len(password) >= _LONG_PASSWORD:
        return re.compile(secret)
    if len(password) >= _WORD_PASSWORD:
        return re.compile(rf"(?<!\w){secret}(?!\w)")
    # In quotes, in password=…, in USER:…@HOST.
    return re.compile(rf"""(?<=['"]){secret}(?=['"])|(?<=password=){secret}(?!\w)|(?<=:){secret}(?=@)""")


def parse(dsn: str) -> Target:
    """Parse a DSN.

    :raises ValueError: with one line that does not show the DSN.
    """
    try:
        parameters = extensions.parse_dsn(dsn)
    except (psycopg2.Error, TypeError, ValueError):
        # libpq's own message quotes the string, and the password with it.
        raise ValueError(
            "not a libpq connection string; write postgresql://USER@HOST:5432/DATABASE or host=… dbname=… user=…"
        ) from None
    for name, instead in _NOT_SUPPORTED.items():
        if name in parameters:
            raise ValueError(f"{name}= is not supported; {instead}")
    hosts, ports = parameters.get("host", "").split(","), parameters.get("port", _DEFAULT_PORT).split(",")
    if len(ports) not in (1, len(hosts)):
        raise ValueError(f"{len(ports)} ports for {len(hosts)} hosts; set one, or one for each host")
    if not all(port == "" or (port.isascii() and port.isdigit() and 0 < int(port) < 65536) for port in ports):
        raise ValueError("a port must be a number from 1 to 65535")
    if parameters.get("sslrootcert") == "system" and parameters.get("sslmode", "verify-full") != "verify-full":
        raise ValueError("sslrootcert=system needs sslmode=verify-full, or no sslmode")
    return Target(parameters)


def problem(dsn: str) -> str | None:
    """Return the problem of a DSN in a line without the DSN; None if it is valid."""
    try:
        parse(dsn)
    except ValueError as error:
        return str(error)
    return None


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_name(host: str) -> bool:
    # libpq: an empty host is the default unix socket; a path or @abstract names a socket.
    return bool(host) and not host.startswith(("/", "@")) and not is_address(host)
