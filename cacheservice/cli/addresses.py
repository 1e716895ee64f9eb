"""Finds the ports of a service: by options, the configuration on disk, and the defaults.

The service may run with an older configuration than the file on disk. If that cannot be read, a default is probably
wrong, and a missing answer does not mean that the service is down.
"""

from __future__ import annotations

import ipaddress
import os

from cacheservice import config
from cacheservice.base.errors import AddressUnknown, Refused
from cacheservice.cli.client import Address, UnixSocket

_DEFAULT_STATUS_PORT = 8000
_DEFAULT_RESP_PORT = 6380
_IS_IT_RUNNING = "is the service running?"


def status_address(host: str | None, port: int | None, *, guess: bool = False) -> Address:
    """Return the first known address: options, configuration, 127.0.0.1:8000.

    :param guess: whether to use the default even if the configuration cannot be read.
    :raises AddressUnknown: if the port is neither given nor in a readable configuration.
    """
    seen = config.glance(os.environ)
    problem = None if port else seen.problem("status", "port")
    if port is None and problem is None and seen.status.port == 0:
        problem = "status.port is 0, any free port; the log names the port in service_started"
    if problem is not None and not guess:
        raise AddressUnknown(
            f"{problem}; the status port is not known: use --port (and --host), or fix the configuration"
        )
    if problem is None and host is None:
        problem = seen.problem("status", "host")
    if problem is not None:
        hint = f"the service may listen elsewhere, see --host and --port: {problem}"
    elif seen.is_absent and host is None and port is None:
        hint = (
            f"{_IS_IT_RUNNING} The working directory has no {config.DEFAULT_FILE}; if the service listens elsewhere, "
            "set CACHESERVICE_CONFIG, or use --host and --port"
        )
    else:
        hint = _IS_IT_RUNNING
    return Address(host or reachable(seen.status.host), port or seen.status.port or _DEFAULT_STATUS_PORT, hint)


def resp_address(host: str | None, port: int | None) -> Address | None:
    """Return the address of the RESP port; None if the port is off, or not wanted (0).

    :raises AddressUnknown: if the port is neither given nor in a readable configuration.
    """
    if port == 0:
        return None
    seen = config.glance(os.environ)
    if port is None:
        for key in ("enabled", "port", "password"):
            if (problem := seen.problem("resp", key)) is not None:
                raise AddressUnknown(problem)
        if not seen.resp.enabled:
            return None
    return Address(host or reachable(seen.resp.host), port or seen.resp.port or _DEFAULT_RESP_PORT, hint="")


def resp_password() -> str:
    """Return the current password: its file may be rotated while a command runs."""
    return config.glance(os.environ).resp.password.get_secret_value()


def admin_socket(path: str | None) -> UnixSocket:
    """Return the admin socket: the option's, or that of the configuration.

    :raises AddressUnknown: if the configuration cannot be read, and so may name a socket.
    :raises Refused: if the configuration names none.
    """
    if path:
        return UnixSocket(path)
    seen = config.glance(os.environ)
    if (problem := seen.problem("admin", "socket")) is not None:
        raise AddressUnknown(
            f"{problem}; nothing was sent: fix the configuration, or name the admin socket with --socket"
        )
    if seen.admin.socket:
        return UnixSocket(seen.admin.socket)
    if seen.is_absent:
        raise AddressUnknown(
            f"{config.DEFAULT_FILE}: not found in the working directory; nothing was sent: name the file in "
            "CACHESERVICE_CONFIG, or the admin socket with --socket"
        )
    raise Refused("the configuration has no admin socket; set admin.socket, or send SIGHUP to the service")


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
