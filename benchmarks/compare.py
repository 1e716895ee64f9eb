"""Another revision of the service against this one: refresh, delta, GET, logins and memory, in alternating runs.

    python -m benchmarks.compare e0b0e17 --rounds 5

Both run with the packages of this environment and on one server, each with a database of its own and the same rows.
What counts is the processor time that the service used, which other work on the machine hardly changes; the time that
passed is shown beside it. Each round measures one revision and then the other, in turns which is first; a ratio is
that of one round.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

import hiredis
import psycopg2

from benchmarks.figures import limit, print_figures
from benchmarks.products import QUERY, TABLE, server_with_products
from benchmarks.service import ROOT, RunningService, cpu_s, memory_bytes, running_service
from cacheservice.cli.embedded import EmbeddedPostgres

MOST_SLOWER = {"refresh": 1.03, "delta": 1.03, "GET": 1.01, "memory": 1.005}
_REFRESHES = 5
_DELTAS = 40
_KEYS = 100
_GETS = 60_000
_PIPELINE = 16
_SETTLE_S = 1.0
_WATCHED = {"watch": [{"table": "public.products", "key": "id"}]}


@dataclass
class Side:
    """A revision, and its figures of each round."""

    name: str
    source: Path
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
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with worktree(options.revision) as before, server_with_products(options.rows) as server:
        sides = [Side("before", before), Side("after", ROOT)]
        for side in sides:
            prepare(server, side, options.rows)
        for number in range(options.rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                side.add(measured(server, side, Random(number), options.rows))
                print(side.name, {what: f"{values[-1]:.4g}" for what, values in side.figures.items()}, flush=True)
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


def prepare(server: EmbeddedPostgres, side: Side, rows: int) -> None:
    server.create_database(side.name)
    server.run_sql(TABLE.format(rows=rows), side.name)
    environment = os.environ | side.environment | {"CACHESERVICE_MIGRATE_DSN": server.dsn(database=side.name)}
    for words in (["migrate"], ["watch", "public.products", "--key", "id"]):
        command = [sys.executable, "-m", "cacheservice", *words]
        subprocess.run(command, check=True, cwd=side.source, env=environment, stdout=subprocess.DEVNULL)


def measured(server: EmbeddedPostgres, side: Side, random: Random, rows: int) -> dict[str, float]:
    """One round of one side: each figure the median of several, memory after all of them."""
    dsn, tac = server.dsn(database=side.name), side.source / "tac" / "cacheservice.tac"
    figures = {}
    with (
        closing(psycopg2.connect(dsn)) as writer,
        running_service(dsn, QUERY, tac=tac, dataset=_WATCHED, **side.environment) as service,
    ):
        with suppress(RuntimeError):
            service.wait_event("listening_began")
        time.sleep(_SETTLE_S)
        service.wait_refreshed()
        figures["memory, bytes a row"] = memory_bytes(service.pid) / rows
        figures |= refreshes(service, writer, random, rows)
        figures |= deltas(service, writer, random, rows)
        figures |= gets(service, random, rows)
    return figures


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
        before_s = cpu_s(service.pid)
        service.start_refresh()
        took.append(service.wait_refreshed()["took_s"])
        computed.append(cpu_s(service.pid) - before_s)
    return {"refresh, CPU s": median(computed), "refresh, s": median(took)}


def deltas(
    service: RunningService, writer: psycopg2.extensions.connection, random: Random, rows: int
) -> dict[str, float]:
    """Deltas of a number of keys, from the notification to the publish."""
    took, began_s = [], cpu_s(service.pid)
    service.events()
    for _ in range(_DELTAS):
        change(writer, random.sample(range(1, rows + 1), _KEYS))
        took.append(service.wait_event("refresh_published")["took_s"])
    return {"delta, CPU s": (cpu_s(service.pid) - began_s) / _DELTAS, "delta, s": median(took)}


def gets(service: RunningService, random: Random, rows: int) -> dict[str, float]:
    """GETs of random rows on one connection, some at a time."""
    requests = [
        b"".join(hiredis.pack_command(("GET", f"products:{random.randint(1, rows)}")) for _ in range(_PIPELINE))
        for _ in range(_GETS // _PIPELINE)
    ]
    reader = hiredis.Reader()
    with socket.create_connection(("127.0.0.1", service.resp_port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        before_s, began_at = cpu_s(service.pid), time.perf_counter()
        for request in requests:
            client.sendall(request)
            answered = 0
            while answered < _PIPELINE:
                while (answer := reader.gets()) is not False:
                    assert isinstance(answer, bytes), answer
                    answered += 1
                if answered < _PIPELINE:
                    reader.feed(client.recv(262_144))
        took_s, computed_s = time.perf_counter() - began_at, cpu_s(service.pid) - before_s
    count = len(requests) * _PIPELINE
    return {"GET, CPU µs": computed_s / count * 1e6, "GET, µs": took_s / count * 1e6}


def compared(before: Side, after: Side) -> Iterator[tuple[str, str, str, str]]:
    for what, values in after.figures.items():
        ratios = [new / old for new, old in zip(values, before.figures[what], strict=True)]
        most = MOST_SLOWER[what.split(",")[0]] if "CPU" in what or "memory" in what else None
        shown = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        yield (
            what,
            f"{median(values):.4g}",
            f"before {median(before.figures[what]):.4g}, ratio {shown}",
            limit(median(ratios), most, "") if most is not None else "",
        )


if __name__ == "__main__":
    main()
