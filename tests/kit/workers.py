"""Worker processes, as the system shows them."""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.kit.http import ask_on
from tests.kit.resp import Client
from tests.kit.waiting import GIVE_UP_S, wait_until

Address = tuple[str, int]


def workers_of(pid: int) -> list[int]:
    """Return the IDs of the running workers of a main process."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(pid).children()
        return sorted(child.pid for child in children if not is_over(child.pid) and "workers" in command_of(child.pid))
    return []


def slice_ns(process: int | str) -> int | None:
    """Return the length of the slices of a process, or of "thread-self"; None if the kernel does not show it."""
    path = Path(f"/proc/{process}/sched")
    found = re.search(r"se\.slice\s*:\s*(\d+)", path.read_text()) if path.exists() else None
    return None if found is None else int(found[1])


def command_of(pid: int) -> str:
    """Return the command line of a process; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def is_over(pid: int) -> bool:
    """Return whether a process has ended, even if its parent has not collected its exit code."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ping(address: Address) -> socket.socket:
    """Connect to the RESP port, and return the connection after its first reply."""
    client = socket.create_connection(address, timeout=GIVE_UP_S)
    reply = Client(client).ask("PING")
    assert reply == b"PONG", reply
    return client


def livez(address: Address) -> socket.socket:
    """Connect to the HTTP port, and return the connection after its first answer."""
    client = socket.create_connection(address, timeout=GIVE_UP_S)
    assert ask_on(client, "/livez").status == 200
    return client


def server_of(client: socket.socket, pids: list[int]) -> int | None:
    """Return the process that has the other end of a connection."""
    return server_at(client.getsockname(), pids)


def server_at(address: tuple[Any, ...], pids: list[int]) -> int | None:
    """Return the process that has the other end of the connection with this address of the client."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            if any(each.raddr[:2] == address[:2] for each in psutil.Process(pid).net_connections("tcp") if each.raddr):
                return pid
    return None


def client_of_each(address: Address, pids: list[int], connect: object = ping) -> dict[int, socket.socket]:
    """Connect until each worker serves a client; return those clients by the IDs of the processes."""
    found: dict[int, socket.socket] = {}

    def all_found() -> bool:
        assert callable(connect)
        client = connect(address)
        pid = server_of(client, pids)
        if pid is None or pid in found:
            client.close()
        else:
            found[pid] = client
        return len(found) == len(pids)

    wait_until(all_found, f"a client of each of {pids}")
    return found
