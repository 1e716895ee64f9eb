"""The URL of a Valkey: one server, several nodes of a cluster, or sentinels. No I/O.

The forms are those of the clients of Redis: ``redis://[[user]:password@]host[:port][,host[:port]…][/database]``, with
``rediss`` for TLS, and ``redis+sentinel://…/name[/database]`` with the sentinels and the name of the service that they
watch. ``valkey`` may stand for ``redis``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

_URL = re.compile(
    r"(?P<scheme>[a-z+]+)://(?:(?P<user>[^:@/]*)(?::(?P<password>[^@/]*))?@)?(?P<hosts>[^/@]*)(?P<path>/.*)?"
)
_HOST = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::(?P<port>[0-9]{1,5}))?")
_PORT, _SENTINEL_PORT = 6379, 26379
_FORM = "write redis://[user:password@]host:port[,host:port][/database], or redis+sentinel://host:port/name"

Address = tuple[str, int]
"""A host name or IP address, and a port."""


class BadUrl(ValueError):
    """The URL is not of a known form. The message never has the password."""


@dataclass(frozen=True, slots=True)
class Target:
    """The servers to connect to.

    :param nodes: the server, some nodes of a cluster, or the sentinels.
    :param service: the name that the sentinels know; empty without sentinels.
    :param user: empty for the default user.
    :param password: empty for none; not in the representation.
    """

    nodes: tuple[Address, ...]
    service: str = ""
    user: str = ""
    password: str = ""
    database: int = 0
    tls: bool = False

    def __repr__(self) -> str:
        hosts = ",".join(f"{host}:{port}" for host, port in self.nodes)
        return f"Target({hosts}, service={self.service!r}, database={self.database}, tls={self.tls})"


def parse(url: str) -> Target:
    """Return the servers that a URL names.

    :raises BadUrl: with the problem; the message has no password.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise BadUrl(f"it is not a URL of a Valkey; {_FORM}")
    scheme, _, kind = match["scheme"].partition("+")
    if scheme not in ("redis", "rediss", "valkey", "valkeys") or kind not in ("", "sentinel"):
        raise BadUrl(f"the scheme {match['scheme']} is unknown; {_FORM}")
    parts = [unquote(part) for part in (match["path"] or "").split("/")[1:] if part]
    service = parts.pop(0) if kind and parts else ""
    if kind and not service:
        raise BadUrl(
            "the name of the service that the sentinels watch is missing; write redis+sentinel://host:port/name"
        )
    if len(parts) > 1 or not all(part.isdecimal() for part in parts):
        raise BadUrl(f"the database is not a number; {_FORM}")
    database = int(parts[0]) if parts else 0
    nodes = tuple(_address(host, _SENTINEL_PORT if kind else _PORT) for host in match["hosts"].split(","))
    if len(nodes) > 1 and not kind and database:
        raise BadUrl("a cluster has database 0 only; leave out the number")
    user, password = unquote(match["user"] or ""), unquote(match["password"] or "")
    return Target(nodes, service, user, password, database, scheme in ("rediss", "valkeys"))


def _address(text: str, port: int) -> Address:
    match = _HOST.fullmatch(text)
    if match is None or int(match["port"] or port) not in range(1, 65536):
        raise BadUrl(f"'{text}' is not a host with a port from 1 to 65535; {_FORM}")
    return match["host"].strip("[]"), int(match["port"] or port)
