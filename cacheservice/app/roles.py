"""The roles of a process: which halves of the service it has."""

from __future__ import annotations

import enum


class Role(enum.Flag):
    """The halves of the service that a process has.

    - READ: it reads from the database into the cache, saves snapshots, and has the admin socket.
    - SERVE: it serves the cache to clients.
    """

    READ = enum.auto()
    SERVE = enum.auto()


WHOLE = Role.READ | Role.SERVE
