"""Refuses what a unit test does without: sockets and processes."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from typing import NoReturn

import pytest


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    """Have a test fail that connects or binds a socket, or starts a program."""

    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise AssertionError("a unit test needs neither a socket nor a process; what does belongs in tests/")

    with pytest.MonkeyPatch.context() as patched:
        for name in ("connect", "connect_ex", "bind"):
            patched.setattr(socket.socket, name, refuse)
        patched.setattr(subprocess.Popen, "__init__", refuse)
        yield
