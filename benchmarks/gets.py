"""GETs of random rows in pipelines, as fast as the service answers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import hiredis

GETS = 100_000
PIPELINE = 16


class Gets(NamedTuple):
    """What a GET took, and what the service computed for it, in seconds."""

    took_s: float
    computed_s: float


def timed_gets(port: int, random: Random, rows: int, computed_s: Callable[[], float]) -> Gets:
    """Read rows of `products` on one connection.

    :param computed_s: returns the CPU time of the processes that answer.
    """
    requests = [
        b"".join(hiredis.pack_command(("GET", f"products:{random.randint(1, rows)}")) for _ in range(PIPELINE))
        for _ in range(GETS // PIPELINE)
    ]
    reader = hiredis.Reader()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        before_s, began_at = computed_s(), time.perf_counter()
        for request in requests:
            client.sendall(request)
            answered = 0
            while answered < PIPELINE:
                while (answer := reader.gets()) is not False:
                    assert isinstance(answer, bytes), answer
                    answered += 1
                if answered < PIPELINE:
                    reader.feed(client.recv(262_144))
        took_s, spent_s = time.perf_counter() - began_at, computed_s() - before_s
    count = len(requests) * PIPELINE
    return Gets(took_s / count, spent_s / count)
