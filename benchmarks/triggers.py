"""What the triggers of `cacheservice watch` cost a writer: pgbench with and without them, in turns."""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from select import select
from statistics import median

import psycopg2

from benchmarks.figures import floor, limit, print_figures, spread
from benchmarks.products import server_with_products
from cacheservice.base import shipped
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import OWN_CHANNEL
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.watch import unwatch, watch

MOST_OF_MANY = 30  # % of an UPDATE of 10,000 rows
MOST_OF_ONE_MS = {"notify": 0.12, "no notify": 0.08}
LEAST_OF_COMMITS = 0.85

_ROWS = 10_000
_WRITERS = 16
_MANY = """\
\\set first random(1, {last})
UPDATE products SET price = price + 0.01, updated_at = now() WHERE id BETWEEN :first AND :first + {rows} - 1;
"""
_ONE = """\
\\set id random(1, {last})
UPDATE products SET price = price + 0.01, updated_at = now() WHERE id = :id;
"""
# What an application commits is seldom one statement: this is the shape of pgbench's own transaction (tpcb-like).
_SALE = """\
\\set id random(1, {last})
BEGIN;
SELECT price FROM products WHERE id = :id;
UPDATE products SET price = price + 0.01, updated_at = now() WHERE id = :id;
INSERT INTO sales (product_id, price) VALUES (:id, 9.99);
COMMIT;
"""
SALES = "CREATE TABLE sales (product_id integer, price numeric, sold_at timestamptz NOT NULL DEFAULT now())"
# Checkpoints, after which pages are logged whole, and autovacuum would fall on one run and not on another.
UNDISTURBED = """
ALTER SYSTEM SET checkpoint_timeout = '1h';
ALTER SYSTEM SET max_wal_size = '8GB';
ALTER SYSTEM SET autovacuum = off;
SELECT pg_reload_conf();
"""
_VARIANTS = {"without": None, "no notify": False, "notify": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=int, default=5, help="of each run of single-row updates")
    options = parser.parse_args()
    with server_with_products(options.rows) as server:
        migrate(server.dsn(), shipped.folder("migrations"))
        server.run_sql(UNDISTURBED)
        many = _MANY.format(last=options.rows - _ROWS + 1, rows=_ROWS)
        one, sale = one_row(options.rows), one_sale(options.rows)
        server.run_sql(SALES)
        print(f"{_ROWS:,} rows a statement, ms", flush=True)
        many_ms = in_turns(server, options.rounds, many, 1, ["-t", "15"])
        print("a row a statement, one client, ms", flush=True)
        one_ms = in_turns(server, options.rounds, one, 1, ["-T", str(options.seconds)])
        print(f"a row a statement, {_WRITERS} clients, commits/s", flush=True)
        many_writers = (_WRITERS, ["-T", str(options.seconds)])
        commits = in_turns(server, options.rounds, one, *many_writers, per_second=True)
        print("the same, of a row sold in a transaction", flush=True)
        sales = in_turns(server, options.rounds, sale, *many_writers, per_second=True)
        server.settings = {**server.settings, "fsync": "on"}
        server.restart()
        print("both with fsync on", flush=True)
        durable = in_turns(server, options.rounds, one, *many_writers, per_second=True)
        durable_sales = in_turns(server, options.rounds, sale, *many_writers, per_second=True)
    print()
    figures = []
    for variant in ("no notify", "notify"):
        percent = [(ours / bare - 1) * 100 for ours, bare in zip(many_ms[variant], many_ms["without"], strict=True)]
        figures.append(
            (
                f"{_ROWS:,} rows, {variant}: added",
                spread(percent, "{:.0f} %".format),
                f"{spread(many_ms['without'], '{:.1f}'.format)} ms",
                limit(median(percent), MOST_OF_MANY, " %"),
            )
        )
    for variant, most_ms in reversed(MOST_OF_ONE_MS.items()):
        added = [ours - bare for ours, bare in zip(one_ms[variant], one_ms["without"], strict=True)]
        figures.append(
            (
                f"one row, {variant}: added, ms",
                spread(added, "{:.3f}".format),
                f"{spread(one_ms['without'], '{:.3f}'.format)} ms",
                limit(median(added), most_ms, " ms"),
            )
        )
    of_many = {
        "a row, fsync off": commits,
        "a row, fsync on": durable,
        "a sale, fsync off": sales,
        "a sale, fsync on": durable_sales,
    }
    for what, runs in of_many.items():
        for variant in ("no notify", "notify"):
            ratios = [ours / bare for ours, bare in zip(runs[variant], runs["without"], strict=True)]
            figures.append(
                (
                    f"{_WRITERS} writers of {what}, {variant}: ratio",
                    spread(ratios),
                    f"{spread(runs['without'], '{:,.0f}'.format)} commits/s",
                    floor(median(ratios), LEAST_OF_COMMITS) if variant == "no notify" else "",
                )
            )
    print_figures(figures)


def one_row(rows: int) -> str:
    """The script of a writer of single rows."""
    return _ONE.format(last=rows)


def one_sale(rows: int) -> str:
    """The script of a writer of transactions."""
    return _SALE.format(last=rows)


def in_turns(
    server: EmbeddedPostgres, rounds: int, script: str, clients: int, length: list[str], per_second: bool = False
) -> dict[str, list[float]]:
    """A run of each variant a round, another first each time: median ms of a transaction, or transactions a second."""
    told: dict[str, list[float]] = {variant: [] for variant in _VARIANTS}
    variants = list(_VARIANTS.items())
    with listening(server):
        pgbench(server, script, clients, length, per_second)
        for _ in range(rounds):
            variants.append(variants.pop(0))
            for variant, notify in variants:
                if notify is not None:
                    watch(server.dsn(), "products", ["id"], notify, False, print)
                server.run_sql("VACUUM products")  # so that bloat does not drift into the next
                told[variant].append(pgbench(server, script, clients, length, per_second))
                if notify is not None:
                    unwatch(server.dsn(), "products", [], False, print)
                    server.run_sql("VACUUM cacheservice.changes")
            shown = {variant: round(values[-1], 3) for variant, values in told.items()}
            print("   ".join(f"{variant} {value:,}" for variant, value in shown.items()), flush=True)
    return told


def pgbench(server: EmbeddedPostgres, script: str, clients: int, length: list[str], per_second: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "script.sql"
        path.write_text(script)
        finished = subprocess.run(
            [
                *(server.psql_path.with_name("pgbench"), "-n", "-c", str(clients), "-j", str(min(clients, 2))),
                *(*length, "-l", "--log-prefix", f"{folder}/log", "-f", path),
                f"host={server.socket_directory} port={server.port} user=postgres dbname=postgres",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        if not per_second:
            # Third column: µs of the transaction (PostgreSQL manual, pgbench, "Per-Transaction Logging").
            lines = [line for log in Path(folder).glob("log*") for line in log.read_text().splitlines()]
            return median(int(line.split()[2]) for line in lines) / 1000
    tps = re.search(r"tps = ([\d.]+)", finished.stdout)
    assert tps is not None, finished.stdout
    return float(tps[1])


@contextmanager
def listening(server: EmbeddedPostgres) -> Iterator[None]:
    """A session that takes notifications, as the service's does: without one they cost less."""
    ended = threading.Event()
    with closing(psycopg2.connect(server.dsn())) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(f"LISTEN {OWN_CHANNEL}")

        def take() -> None:
            while not ended.is_set():
                if select([connection], [], [], 0.1)[0]:
                    connection.poll()
                    connection.notifies.clear()

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


if __name__ == "__main__":
    main()
