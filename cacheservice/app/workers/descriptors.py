"""The descriptors that a worker inherits, by their numbers in its process."""

from __future__ import annotations

LINK = 3
MEMORY = 4
"""The memory that all processes share."""
_FIRST_PORT = 10
_PORTS = ("resp", "http")


def of_port(name: str, worker: int) -> int:
    """Return the descriptor of the socket of a port that belongs to a worker. All workers have those of all.

    :param name: resp or http.
    :param worker: its number, from 1.
    """
    return _FIRST_PORT + len(_PORTS) * (worker - 1) + _PORTS.index(name)
