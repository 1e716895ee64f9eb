"""TCP ports that nobody uses."""

from __future__ import annotations

from cacheservice.cli.embedded import _free_port


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens, and which the kernel gives to no client meanwhile."""
    return _free_port()
