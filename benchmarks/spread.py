"""How evenly connections spread over worker processes, and what becomes of them when one worker is killed.

It compares one listening socket that all workers share, with several limits of the connections accepted in one turn,
with a socket of its own for each worker (SO_REUSEPORT). In both cases this process binds the sockets and keeps them
open. The workers use the listening port of the service, and echo what they receive. In the service, each worker has its
own socket, and the others take over that of a worker that does not accept.
"""

from __future__ import annotations

import argparse
import selectors
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from benchmarks.connections import allow_descriptors
from cacheservice.ports.listen import BACKLOG

_ANSWER_LIMIT_S = 2.0
_SPARE_DESCRIPTORS = 200
ACCEPTED = (1, 4, 8, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--connections", type=int, nargs="*", default=[200, 2000])
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 4])
    options = parser.parse_args()
    allow_descriptors(max(options.connections) + _SPARE_DESCRIPTORS)
    print("connections of the busiest worker, as a multiple of an even share (median of the runs, and the worst):\n")
    print("| sockets | workers | connections | in one burst | one after another |")
    print("| --- | --- | --- | --- | --- |")
    for workers in options.workers:
        for connections in options.connections:
            for name, own, accepted in kinds():
                cells = []
                for connect in (burst, one_by_one):
                    worst = [busiest(workers, connections, own, accepted, connect) for _ in range(options.runs)]
                    cells.append(f"{median(worst):.2f} ({max(worst):.2f})")
                print(f"| {name} | {workers} | {connections:,} | {cells[0]} | {cells[1]} |", flush=True)
    print("\nnew connections without an answer within 2 s while one of two workers is dead:\n")
    for name, own, taken_over in (("shared", False, False), ("own", True, False), ("own, taken over", True, True)):
        print(f"- {name}: {unanswered(own, taken_over)} of 200")


def kinds() -> Iterator[tuple[str, bool, int]]:
    for accepted in ACCEPTED:
        yield f"shared, {accepted} accepted in one turn", False, accepted
    yield "own", True, 100


def busiest(
    workers: int, connections: int, own: bool, accepted: int, connect: Callable[[Any, int], list[socket.socket]]
) -> float:
    """Return the connections of the busiest worker, as a multiple of an even share."""
    with running(workers, own, accepted) as (address, processes):
        clients = connect(address, connections)
        counts = [count_of(process) for process in processes]
        assert sum(counts) == connections, counts
        for client in clients:
            client.close()
    return max(counts) * workers / connections


def unanswered(own: bool, taken_over: bool) -> int:
    """Return how many of 200 new connections get no answer while one of two workers is dead.

    :param taken_over: whether the other worker accepts from its socket.
    """
    with running(2, own, 100) as (address, processes):
        processes[0].kill()
        processes[0].wait()
        if taken_over:
            count_of(processes[1], b"all")
        answered = 0
        for _ in range(200):
            with socket.create_connection(address) as client:
                client.settimeout(_ANSWER_LIMIT_S if answered == 0 else 0.1)
                client.sendall(b"x")
                try:
                    answered += bool(client.recv(1))
                except TimeoutError:
                    continue
    return 200 - answered


def burst(address: Any, connections: int) -> list[socket.socket]:
    """Connect all at once, each with a request, and wait for all answers."""
    clients = []
    with selectors.DefaultSelector() as selector:
        for _ in range(connections):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(address)
            selector.register(client, selectors.EVENT_WRITE)
            clients.append(client)
        waiting = connections
        while waiting:
            for key, events in selector.select():
                if events & selectors.EVENT_WRITE:
                    key.fileobj.send(b"x")  # type: ignore[union-attr]
                    selector.modify(key.fileobj, selectors.EVENT_READ)
                else:
                    assert key.fileobj.recv(1)  # type: ignore[union-attr]
                    selector.unregister(key.fileobj)
                    waiting -= 1
    return clients


def one_by_one(address: Any, connections: int) -> list[socket.socket]:
    """Connect one after another, each after the answer to the one before."""
    clients = []
    for _ in range(connections):
        client = socket.create_connection(address)
        client.sendall(b"x")
        assert client.recv(1)
        clients.append(client)
    return clients


@contextmanager
def running(workers: int, own: bool, accepted: int) -> Iterator[tuple[Any, Sequence[subprocess.Popen[bytes]]]]:
    """Run workers that accept from one shared socket, or each from its own."""
    sockets: list[socket.socket] = []
    address: Any = ("127.0.0.1", 0)
    for _ in range(workers if own else 1):
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(own))
        made.bind(address)
        made.listen(BACKLOG)
        made.setblocking(False)
        address = made.getsockname()
        sockets.append(made)
    processes = []
    try:
        for number in range(workers):
            descriptors = [each.fileno() for each in sockets]
            arguments = [accepted, number if own else 0, *descriptors]
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.spread_worker", *map(str, arguments)],
                pass_fds=descriptors,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            processes.append(process)
        for process in processes:
            assert count_of(process) == 0
        yield address, processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        for made in sockets:
            made.close()


def count_of(process: subprocess.Popen[bytes], line: bytes = b"count") -> int:
    """Send a line, and return the number of connections that a worker has accepted."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + b"\n")
    process.stdin.flush()
    return int(process.stdout.readline())


if __name__ == "__main__":
    main()
