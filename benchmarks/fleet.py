"""What a fleet costs PostgreSQL, how soon a commit is read on every process, and how soon a new process serves.

Five processes of a fleet against one service without a Valkey, at the same time, each side with a PostgreSQL of its
own. PostgreSQL's time is the processor time of all its processes, also of those that have ended, between two moments
at which no query runs, divided by the number of reads between them.

Commits are read on every process by GETs two milliseconds apart. A commit follows the one before after PAUSE_S, so that
the machine does not compute all the time.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from random import Random
from statistics import median

import hiredis
import psycopg2

from benchmarks.figures import limit, mib, ms, percentile, print_figures, spread
from benchmarks.products import TABLE, own_server
from benchmarks.service import ROOT, RunningService, memory_bytes, running_service, scheduled_s
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.watch import watch
from tests.kit.valkey import ValkeyServer, running_valkey

MOST_DATABASE_RATIO = 1.05
MOST_VISIBLE_P99_S = 0.1
MOST_START_RATIO = 0.5

_WATCHED = {"watch": [{"table": "public.products", "key": "id"}]}
_INTERVAL_S = 2.0
_INTERVALS = 5
_SETTLE_S = 3.0
PAUSE_S = 0.1
_POLL_S = 0.002
_GIVE_UP_S = 120.0

Figure = tuple[str, str, str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5, help="of intervals, and of starts")
    parser.add_argument("--commits", type=int, default=400)
    options = parser.parse_args()
    with own_server() as server, running_valkey() as valkey:
        rows = [
            *database_time(valkey, options.rows, options.processes, options.rounds),
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


class Side:
    """A PostgreSQL of our own, with the table."""

    def __init__(self, stack: ExitStack, name: str, rows: int) -> None:
        self._server = stack.enter_context(own_server())
        self.dsn = stack.enter_context(database(self._server, name, rows))
        self._session = stack.enter_context(closing(psycopg2.connect(self.dsn)))
        self._session.autocommit = True

    def _value(self, query: str) -> int:
        with self._session.cursor() as cursor:
            cursor.execute(query)
            return int(cursor.fetchone()[0])

    def sessions(self) -> int:
        return self._value("SELECT count(*) - 1 FROM pg_stat_activity WHERE backend_type = 'client backend'")

    def reads(self) -> int:
        """The full reads so far, once no query runs."""
        active = "SELECT count(*) - 1 FROM pg_stat_activity WHERE state <> 'idle' AND datname = current_database()"
        while self._value(active):
            time.sleep(0.02)
        return self._value("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'products'")

    def cpu_s(self) -> float:
        """Seconds that its processes have computed, without our own session."""
        postmaster = self._server.pid
        assert postmaster is not None, "it runs"
        fields = Path(f"/proc/{postmaster}/stat").read_text().rpartition(")")[2].split()
        total = (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")  # of the processes that have ended
        running = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        for pid in (postmaster, *map(int, running)):
            if pid != self._session.info.backend_pid:
                with suppress(OSError):
                    total += scheduled_s(pid)
        return total


def database_time(valkey: ValkeyServer, rows: int, processes: int, rounds: int) -> Iterator[Figure]:
    """PostgreSQL's time in each interval, with full reads."""
    rows = min(rows, 200_000)
    with ExitStack() as stack:
        sides = {name: Side(stack, name, rows) for name in ("one", "fleet")}
        for name, count, more in (("one", 1, ""), ("fleet", processes, clustered(valkey, "time"))):
            for _ in range(count):
                dsn = sides[name].dsn
                stack.enter_context(running_service(dsn, dataset={"interval_s": _INTERVAL_S}, more=more, wait=False))
        time.sleep(2 * _SETTLE_S)
        spent: dict[str, list[float]] = {name: [] for name in sides}
        begins = {name: (side.reads(), side.cpu_s()) for name, side in sides.items()}
        before = begins
        for number in range(rounds):
            time.sleep(_INTERVALS * _INTERVAL_S)
            now = {name: (side.reads(), side.cpu_s()) for name, side in sides.items()}
            shown = []
            for name in sides:
                reads, cpu_s = (new - old for new, old in zip(now[name], before[name], strict=True))
                spent[name].append(1000 * cpu_s / reads)
                shown.append(f"{name} {spent[name][-1]:.1f} ms of {reads} reads")
            before = now
            print(f"round {number}: " + ", ".join(shown), flush=True)
        sessions = {name: side.sessions() for name, side in sides.items()}
    ratios = [new / old for new, old in zip(spent["fleet"], spent["one"], strict=True)]
    reads = [before[name][0] - begins[name][0] for name in ("fleet", "one")]
    total = {name: (before[name][1] - begins[name][1]) / (before[name][0] - begins[name][0]) for name in sides}
    yield (
        f"PostgreSQL's CPU per interval, {processes} to 1, {reads[0]} and {reads[1]} intervals",
        f"{total['fleet'] / total['one']:.3f}; rounds {spread(ratios)}",
        f"one {1000 * total['one']:.1f} ms",
        limit(total["fleet"] / total["one"], MOST_DATABASE_RATIO, ""),
    )
    yield "sessions at PostgreSQL", f"{sessions['fleet']}", f"one {sessions['one']}", ""


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
            while waiting := [(client, old) for client, old in waiting if exchanged(client, request) == old]:
                assert time.perf_counter() < began_at + _GIVE_UP_S, "the change does not arrive"
                time.sleep(_POLL_S)
            took.append(time.perf_counter() - began_at)
            time.sleep(PAUSE_S)
        memory = [memory_bytes(service.pid) for service in services]
    p99 = percentile(took, 99)
    pace = len(took) / (sum(took) + len(took) * PAUSE_S)
    shown = f"p50 {ms(percentile(took, 50))}, max {ms(max(took))}; {pace:.1f} commits/s"
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
