"""Questions to a status port, and commands to an admin socket."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.kit.waiting import GIVE_UP_S


def ask(address: tuple[str, int] | Path, line: str, limit_s: float = GIVE_UP_S) -> str:
    """Return the reply to a line, without its end.

    :param address: of a port, or the path of a socket.
    """
    with connected(address, limit_s) as client:
        client.sendall(f"{line}\n".encode())
        with client.makefile("r", encoding="utf-8") as reply:
            return reply.read().removesuffix("\n")


def connected(address: tuple[str, int] | Path, limit_s: float = GIVE_UP_S) -> socket.socket:
    """Return a blocking connection to a port, or to a socket by its path."""
    if isinstance(address, tuple):
        return socket.create_connection(address, timeout=limit_s)
    client = socket.socket(socket.AF_UNIX)
    try:
        client.settimeout(limit_s)
        client.connect(str(address))
    except OSError:
        client.close()
        raise
    return client
