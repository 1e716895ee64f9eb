"""What a fleet costs PostgreSQL, how soon a commit is read on every process, and how soon a new process serves.

Five processes of a fleet against one service without a Valkey, on one server, each side with a database of its own.
PostgreSQL's time is `active_time` of pg_stat_database: what its sessions spent in statements.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from random import Random
from statistics import median

import hiredis
import psycopg2

from benchmarks.figures import limit, mib, ms, percentile, print_figures, spread
from benchmarks.products import TABLE, server_with_products
from benchmarks.service import ROOT, RunningService, memory_bytes, running_service
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.watch import watch
from tests.kit.valkey import ValkeyServer, running_valkey

MOST_DATABASE_RATIO = 1.05
MOST_VISIBLE_P99_S = 0.1
MOST_START_RATIO = 0.5

_WATCHED = {"watch": [{"table": "public.products", "key": "id"}]}
_INTERVAL_S = 2.0
_SETTLE_S = 2.0
_PAUSE_S = 0.0005
_GIVE_UP_S = 120.0

Figure = tuple[str, str, str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5, help="of intervals, and of starts")
    parser.add_argument("--commits", type=int, default=200)
    options = parser.parse_args()
    with server_with_products(options.rows) as server, running_valkey() as valkey:
        rows = [
            *database_time(server, valkey, options.rows, options.processes, options.rounds),
            *visible(server, valkey, options.rows, options.processes, options.commits),
            *starts(server, valkey, options.rows, options.rounds),
        ]
    print()
    print_figures(rows)


@contextmanager
def database(server: EmbeddedPostgres, name: str, rows: int) -> Iterator[str]:
    """A database with the watched table; its DSN."""
    server.create_database(name)
    server.run_sql(TABLE.format(rows=rows), name)
    dsn = server.dsn(database=name)
    migrate(dsn, ROOT / "migrations")
    watch(dsn, "public.products", ["id"], notify=True, dry_run=False, show=lambda line: None)
    yield dsn
    server.run_sql(f"DROP DATABASE {name} WITH (FORCE)")


def clustered(valkey: ValkeyServer, prefix: str) -> str:
    """The table of the configuration that makes a service a process of a fleet."""
    return f'\n[cluster]\nenabled = true\nvalkey_url = "redis://{valkey.address}"\nprefix = "{prefix}"\n'


def database_time(
    server: EmbeddedPostgres, valkey: ValkeyServer, rows: int, processes: int, rounds: int
) -> Iterator[Figure]:
    """PostgreSQL's time in each interval, with full reads."""
    rows = min(rows, 200_000)

    def active_ms(name: str) -> float:
        return float(server.run_sql(f"SELECT active_time FROM pg_stat_database WHERE datname = '{name}'"))

    with ExitStack() as stack:
        for name, count, more in (("one", 1, ""), ("fleet", processes, clustered(valkey, "time"))):
            dsn = stack.enter_context(database(server, name, rows))
            for _ in range(count):
                stack.enter_context(running_service(dsn, dataset={"interval_s": _INTERVAL_S}, more=more, wait=False))
        time.sleep(_SETTLE_S)
        spent: dict[str, list[float]] = {"one": [], "fleet": []}
        for number in range(rounds):
            before = {name: active_ms(name) for name in spent}
            time.sleep(3 * _INTERVAL_S)
            for name, each in spent.items():
                each.append((active_ms(name) - before[name]) / 3)
            print(
                f"round {number}: " + ", ".join(f"{name} {each[-1]:.1f} ms" for name, each in spent.items()), flush=True
            )
    ratios = [new / old for new, old in zip(spent["fleet"], spent["one"], strict=True)]
    shown = f"one {spread(spent['one'])} ms"
    yield (
        f"PostgreSQL's time per interval, {processes} to 1",
        spread(ratios),
        shown,
        limit(median(ratios), MOST_DATABASE_RATIO, ""),
    )


def visible(
    server: EmbeddedPostgres, valkey: ValkeyServer, rows: int, processes: int, commits: int
) -> Iterator[Figure]:
    """From a commit to a GET of the new value on every process."""
    random, took = Random(1), []
    with ExitStack() as stack:
        dsn = stack.enter_context(database(server, "visible", rows))
        more = clustered(valkey, "visible")
        services = [
            stack.enter_context(running_service(dsn, dataset=_WATCHED, more=more, wait=False)) for _ in range(processes)
        ]
        clients = [stack.enter_context(closing(connected(service))) for service in services]
        for client in clients:
            until_read(client, 1)
        writer = stack.enter_context(closing(psycopg2.connect(dsn)))
        time.sleep(_SETTLE_S)
        for _ in range(commits):
            key = random.randint(1, rows)
            request = hiredis.pack_command(("GET", f"products:{key}"))
            waiting = [(client, exchanged(client, request)) for client in clients]
            with writer.cursor() as cursor:
                cursor.execute("UPDATE products SET stock = stock + 1 WHERE id = %s", (key,))
            writer.commit()
            began_at = time.perf_counter()
            while waiting:
                waiting = [(client, old) for client, old in waiting if exchanged(client, request) == old]
                assert time.perf_counter() < began_at + _GIVE_UP_S, "the change does not arrive"
                time.sleep(_PAUSE_S)
            took.append(time.perf_counter() - began_at)
        memory = [memory_bytes(service.pid) for service in services]
    p99 = percentile(took, 99)
    shown = f"p50 {ms(percentile(took, 50))}, most {ms(max(took))}"
    yield f"commit to a read on {processes} processes, p99", ms(p99), shown, limit(p99 * 1000, 100, " ms")
    yield "memory of a process", mib(median(memory)), f"{rows:,} rows", ""


def starts(server: EmbeddedPostgres, valkey: ValkeyServer, rows: int, rounds: int) -> Iterator[Figure]:
    """From the start of a process to the first row that it serves."""
    from_database, from_valkey = [], []
    with database(server, "starts", rows) as dsn, ExitStack() as stack:
        more = clustered(valkey, "starts")
        leader = stack.enter_context(running_service(dsn, dataset=_WATCHED, more=more, wait=False))
        with closing(connected(leader)) as client:
            until_read(client, 1)
        time.sleep(_SETTLE_S)
        for _ in range(rounds):
            for more_of, found in (("", from_database), (more, from_valkey)):
                with running_service(dsn, dataset=_WATCHED, more=more_of, wait=False) as service:
                    began_at = time.perf_counter()
                    with closing(connected(service)) as client:
                        until_read(client, 1)
                    found.append(time.perf_counter() - began_at)
            print(f"start: PostgreSQL {from_database[-1]:.2f} s, Valkey {from_valkey[-1]:.2f} s", flush=True)
    ratios = [new / old for new, old in zip(from_valkey, from_database, strict=True)]
    shown = f"PostgreSQL {spread(from_database)} s"
    yield (
        f"first read of {rows:,} rows, Valkey to PostgreSQL",
        spread(ratios),
        shown,
        limit(median(ratios), MOST_START_RATIO, ""),
    )


def connected(service: RunningService) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", service.resp_port))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def exchanged(client: socket.socket, request: bytes) -> bytes:
    client.sendall(request)
    return client.recv(65_536)


def until_read(client: socket.socket, key: int) -> None:
    """Wait until the process serves the row."""
    request, deadline = hiredis.pack_command(("GET", f"products:{key}")), time.monotonic() + _GIVE_UP_S
    while not exchanged(client, request).startswith(b"$"):
        assert time.monotonic() < deadline, "the rows do not arrive"
        time.sleep(0.002)


if __name__ == "__main__":
    print(f"{os.cpu_count()} cores")
    main()
