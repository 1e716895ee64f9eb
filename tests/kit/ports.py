"""TCP ports that nobody uses."""

from __future__ import annotations

from cacheservice.cli import embedded


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens.

    The kernel does not give it to a client meanwhile.
    """
    return embedded.free_port()
