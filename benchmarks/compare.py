"""Another revision of the service against this one, in alternating runs: refresh, delta, GET, HTTP, logins and memory.

    python -m benchmarks.compare e0b0e17 --rounds 16

Both run on one server, each with a database of its own and the same rows; the other revision runs in an environment
of its own, with the packages that it asks for.
What counts is the processor time that the reactor's thread of the service used, which other work on the machine hardly
changes; the time that passed is shown beside it. Both services run all the time, and each round measures one and then
the other for a second or two, in turns which is first, so that slow changes of the machine meet both. A ratio is of
one round; shown are the median and the middle three quarters. Logins are counted by the server, while 50 datasets are
read every 5 s.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean, median

import psycopg2

from benchmarks.figures import limit, print_figures
from benchmarks.gets import timed_gets
from benchmarks.products import QUERY, TABLE, server_with_products
from benchmarks.service import ROOT, RunningService, memory_bytes, running_service, scheduled_s
from cacheservice.cli.embedded import EmbeddedPostgres

MOST_SLOWER = {"refresh": 1.02, "delta": 1.02, "GET": 1.02, "HTTP": 1.02, "memory": 1.02}
MOST_LOGINS_PER_S = 1.0
_REFRESHES = 1
_DELTAS = 60
_KEYS = 100
_HTTP_READS = 20_000
_SETTLE_S = 1.0
_INTERVAL_S = 5
_LOGINS_COUNTED_S = 20
_MANY = "".join(
    f'[datasets.d{number}]\nquery = "SELECT {number} AS id"\nkey = "id"\ninterval_s = {_INTERVAL_S}\n'
    for number in range(50)
)
_WATCHED = {"watch": [{"table": "public.products", "key": "id"}]}


@dataclass
class Side:
    """A revision, and its figures of each round."""

    name: str
    source: Path
    python: Path
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, figures: Mapping[str, float]) -> None:
        for what, value in figures.items():
            self.figures.setdefault(what, []).append(value)

    @property
    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self.source)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="what Git calls the build before")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=16)
    options = parser.parse_args()
    with worktree(options.revision) as before, server_with_products(options.rows) as server:
        sides = [Side("before", before, environment_of(before)), Side("after", ROOT, Path(sys.executable))]
        for side in sides:
            prepare(server, side, options.rows)
            side.add(of_small_datasets(server, side))
        with ExitStack() as running:
            measured = [running.enter_context(loaded(server, side, options.rows)) for side in sides]
            for number in range(options.rounds):
                for each in measured if number % 2 == 0 else measured[::-1]:
                    each.round(Random(number))
                    shown = {what: f"{values[-1]:.4g}" for what, values in each.side.figures.items()}
                    print(each.side.name, shown, flush=True)
    print()
    print_figures(list(compared(*sides)))


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """The files of a revision, in a folder that goes again."""
    with tempfile.TemporaryDirectory(prefix="cacheservice-compare-") as name:
        folder = Path(name) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", folder, revision], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def environment_of(source: Path) -> Path:
    """The interpreter of a new environment, beside `source`, with the packages that it asks for."""
    folder = source.with_name("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--editable", source], check=True)
    return python


def prepare(server: EmbeddedPostgres, side: Side, rows: int) -> None:
    server.create_database(side.name)
    server.run_sql(TABLE.format(rows=rows), side.name)
    environment = os.environ | side.environment | {"CACHESERVICE_MIGRATE_DSN": server.dsn(database=side.name)}
    for words in (["migrate"], ["watch", "public.products", "--key", "id"]):
        command = [side.python, "-m", "cacheservice", *words]
        subprocess.run(command, check=True, cwd=side.source, env=environment, stdout=subprocess.DEVNULL)


def of_small_datasets(server: EmbeddedPostgres, side: Side) -> dict[str, float]:
    """How many sessions the service opens a second once all datasets are loaded, and the memory that it takes."""
    dsn, tac = server.dsn(database=side.name), side.source / "tac" / "cacheservice.tac"

    def logins() -> int:
        return int(server.run_sql(f"SELECT sessions FROM pg_stat_database WHERE datname = '{side.name}'"))

    with running_service(dsn, "SELECT 1 AS id", tac=tac, more=_MANY, python=side.python, **side.environment) as service:
        time.sleep(_INTERVAL_S)
        before, began_at = logins(), time.monotonic()
        time.sleep(_LOGINS_COUNTED_S)
        return {
            "logins/s": (logins() - before) / (time.monotonic() - began_at),
            "memory, empty, bytes": memory_bytes(service.pid),
        }


@dataclass
class Measured:
    """A side's service, with all rows loaded."""

    side: Side
    service: RunningService
    writer: psycopg2.extensions.connection
    rows: int

    def round(self, random: Random) -> None:
        service, writer, rows = self.service, self.writer, self.rows
        figures = refreshes(service, writer, random, rows) | deltas(service, writer, random, rows)
        self.side.add(figures | gets(service, random, rows) | http_reads(service, random, rows))


@contextmanager
def loaded(server: EmbeddedPostgres, side: Side, rows: int) -> Iterator[Measured]:
    dsn, tac = server.dsn(database=side.name), side.source / "tac" / "cacheservice.tac"
    with (
        closing(psycopg2.connect(dsn)) as writer,
        running_service(dsn, QUERY, tac=tac, dataset=_WATCHED, python=side.python, **side.environment) as service,
    ):
        with suppress(RuntimeError):
            service.wait_event("listening_began")
        time.sleep(_SETTLE_S)
        service.wait_refreshed()
        (empty_bytes,) = side.figures.pop("memory, empty, bytes")
        side.add({"memory, bytes a row": (memory_bytes(service.pid) - empty_bytes) / rows})
        yield Measured(side, service, writer, rows)


def change(writer: psycopg2.extensions.connection, keys: list[int]) -> None:
    with writer.cursor() as cursor:
        cursor.execute("UPDATE products SET stock = stock + 1 WHERE id = ANY(%s)", (keys,))
    writer.commit()


def refreshes(
    service: RunningService, writer: psycopg2.extensions.connection, random: Random, rows: int
) -> dict[str, float]:
    """Full reads, each of other rows than the one before."""
    computed, took = [], []
    for _ in range(_REFRESHES):
        change(writer, [random.randint(1, rows)])
        time.sleep(_SETTLE_S)  # what the trigger began has ended
        service.wait_refreshed()
        before_s = scheduled_s(service.pid)
        service.start_refresh()
        took.append(service.wait_refreshed()["took_s"])
        computed.append(scheduled_s(service.pid) - before_s)
    return {"refresh, CPU s": median(computed), "refresh, s": median(took)}


def deltas(
    service: RunningService, writer: psycopg2.extensions.connection, random: Random, rows: int
) -> dict[str, float]:
    """Deltas of a number of keys, from the notification to the publish."""
    took, began_s = [], scheduled_s(service.pid)
    service.events()
    for _ in range(_DELTAS):
        change(writer, random.sample(range(1, rows + 1), _KEYS))
        took.append(service.wait_event("refresh_published")["took_s"])
    return {"delta, CPU s": (scheduled_s(service.pid) - began_s) / _DELTAS, "delta, s": fmean(took)}


def gets(service: RunningService, random: Random, rows: int) -> dict[str, float]:
    """GETs of random rows on one connection, some at a time."""
    found = timed_gets(service.resp_port, random, rows, lambda: scheduled_s(service.pid))
    return {"GET, CPU µs": found.computed_s * 1e6, "GET, µs": found.took_s * 1e6}


def http_reads(service: RunningService, random: Random, rows: int) -> dict[str, float]:
    """Reads of random rows over HTTP on one connection, one after the other."""
    end = b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.http_port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        before_s, began_at = scheduled_s(service.pid), time.perf_counter()
        for _ in range(_HTTP_READS):
            path = b"/v1/datasets/products/rows/%d" % random.randint(1, rows)
            client.sendall(b"GET %b HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n" % path)
            answer = client.recv(65_536)
            # A row is small, and arrives in one piece.
            assert answer.startswith(b"HTTP/1.1 200"), answer
            assert end in answer, answer
        took_s, computed_s = time.perf_counter() - began_at, scheduled_s(service.pid) - before_s
    return {"HTTP, CPU µs": computed_s / _HTTP_READS * 1e6, "HTTP, µs": took_s / _HTTP_READS * 1e6}


def compared(before: Side, after: Side) -> Iterator[tuple[str, str, str, str]]:
    for what, values in after.figures.items():
        # Both may be without any login.
        ratios = sorted(new / old if old else math.nan for new, old in zip(values, before.figures[what], strict=True))
        edge = len(ratios) // 8
        shown = f"{median(ratios):.3f} ({ratios[edge]:.3f} to {ratios[-1 - edge]:.3f})"
        if what == "logins/s":
            target = limit(median(values), MOST_LOGINS_PER_S, "")
        elif "CPU" in what or "memory" in what:
            target = limit(median(ratios), MOST_SLOWER[what.split(",")[0]], "")
        else:
            target = ""
        yield what, f"{median(values):.4g}", f"before {median(before.figures[what]):.4g}, ratio {shown}", target


if __name__ == "__main__":
    main()
