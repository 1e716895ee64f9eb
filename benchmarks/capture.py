"""What change capture by logical decoding costs writers and the service, and how soon a commit is read.

The service is a child process with `capture = "logical"` that watches `products`, and PostgreSQL has
`wal_level = logical` in all runs. CPU is run time by the kernel's schedstat. "noise" is the same run without capture,
compared with itself. With --kills sessions, services and the network end at random moments instead:
`benchmarks/capture_kills.py`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from random import Random, randrange
from statistics import median
from typing import Any, NamedTuple

import psycopg2

from benchmarks import capture_kills
from benchmarks.deltas import RespClient, next_price
from benchmarks.figures import floor, limit, ms, percentile, print_figures, spread
from benchmarks.products import server_with_products
from benchmarks.service import ROOT, RunningService, running_service, scheduled_s
from benchmarks.stall import CLOCKS, take
from benchmarks.triggers import SALES, UNDISTURBED, one_row, one_sale
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.publishing import publish
from cacheservice.sources.postgres.watch import unwatch, watch

MOST_OF_WRITERS = 1.03
LEAST_OF_COMMITS = 0.9
MOST_VISIBLE_MS = {50: 3.0, 99: 20.0}
MOST_ROW_US = 5.0
MOST_STALL_MS = 5.0

SETTINGS = {"wal_level": "logical"}
_TABLE, _PUBLICATION = "public.products", "cacheservice"
_WATCHED = {"watch": [{"table": _TABLE, "key": "id"}]}
_WRITERS = 16
_PACED = ("4", "2000")
"""So many writers, and commits a second of all of them, leave both cores mostly idle."""
_TAC = Path(__file__).with_name("stall.tac")
_ASIDE = 1000
"""The first rows are for the commits that are timed; a load changes the others."""
_WAIT_LIMIT_S = 120.0
_POLL_S = 0.01
_SAMPLE_S = 0.02
_PAUSE_S = 0.0005
_LOAD = """\
\\set id random({first}, {last})
UPDATE products SET stock = stock + 1 WHERE id = :id;
"""

Figure = tuple[str, str, str, str]


class Run(NamedTuple):
    """Of one run of writers: commits per second, and microseconds of CPU per commit."""

    commits_s: float
    writers_us: float
    walsender_us: float
    service_us: float


class Decoded(NamedTuple):
    """Of one transaction: CPU per row, and the longest turns of the reactor, by the clocks of `benchmarks.stall`."""

    service_us: float
    walsender_us: float
    longest_s: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=["writers", "visible", "rows"])
    parser.add_argument("--rows", type=int, default=1_000_000, help="for all but the writers")
    parser.add_argument("--writer-rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3, help="of the writers")
    parser.add_argument("--seconds", type=int, default=2, help="of each run of the writers")
    parser.add_argument("--samples", type=int, default=300, help="commits that are timed, idle and under load")
    parser.add_argument("--load", type=int, default=5000, help="rows a second that change meanwhile")
    parser.add_argument("--transactions", type=int, default=2, help="of so many rows as the table has, of each kind")
    parser.add_argument("--kills", type=int, nargs="?", const=30, help="rounds of faults, instead of all else")
    parser.add_argument("--seed", type=int, help="a random one if it is not given")
    options = parser.parse_args()
    seed = randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    if options.kills is not None:
        raise SystemExit(capture_kills.run(options.kills, seed))
    parts = options.parts or ["writers", "visible", "rows"]
    figures: list[Figure] = []
    if "writers" in parts:
        with server_with_products(options.writer_rows, SETTINGS) as server:
            figures += writers(server, options)
    if "visible" in parts or "rows" in parts:
        with server_with_products(options.rows, SETTINGS) as server, closing(psycopg2.connect(server.dsn())) as writer:
            server.run_sql(UNDISTURBED)
            if "visible" in parts:
                figures += visible(server, writer, Random(seed), options)
            if "rows" in parts:
                publish(server.dsn(), _TABLE, ["id"], _PUBLICATION, False, print)
                figures += rows(server, writer, options)
    print()
    print_figures(figures)


@contextmanager
def capturing(server: EmbeddedPostgres, how: str = "logical", **more: Any) -> Iterator[RunningService]:
    """The service, once it can read deltas."""
    dataset = {**_WATCHED, **more.pop("dataset", {})}
    with running_service(server.dsn(), dataset=dataset, CACHESERVICE_POSTGRES__CAPTURE=how, **more) as service:
        service.wait_event("capture_began" if how == "logical" else "listening_began")
        time.sleep(0.5)
        service.wait_refreshed()
        yield service


def walsender(server: EmbeddedPostgres) -> int:
    """The process that decodes the log."""
    return int(server.run_sql("SELECT active_pid FROM pg_replication_slots WHERE slot_name LIKE 'cacheservice%'"))


# Writers


def writers(server: EmbeddedPostgres, options: argparse.Namespace) -> list[Figure]:
    migrate(server.dsn(), ROOT / "migrations")
    server.run_sql(UNDISTURBED)
    server.run_sql(SALES)
    scripts = {"a row": one_row(options.writer_rows), "a sale": one_sale(options.writer_rows)}
    figures: list[Figure] = []
    for fsync in ("off", "on"):
        if fsync == "on":
            server.settings = {**server.settings, "fsync": "on"}
            server.restart()
        for what, script in scripts.items():
            name = f"{_WRITERS} writers of {what}, fsync {fsync}"
            print(f"{name}: commits/s, CPU of the writers per commit", flush=True)
            figures += writers_figures(name, in_turns(server, script, options.rounds, options.seconds))
    clients, rate = _PACED
    name = f"{clients} writers of a row, {int(rate):,} commits/s, fsync on"
    print(f"{name}: CPU of the writers per commit", flush=True)
    runs = in_turns(server, scripts["a row"], options.rounds, options.seconds, int(clients), ("-R", rate))
    # The first figure of each variant, commits per second, is what was asked for.
    figures += [figure for figure in writers_figures(name, runs) if "commits/s" not in figure[0].removeprefix(name)]
    return figures


def in_turns(
    server: EmbeddedPostgres,
    script: str,
    rounds: int,
    seconds: int,
    clients: int = _WRITERS,
    pace: tuple[str, ...] = (),
) -> dict[str, list[Run]]:
    """A run of each variant a round, another first each time."""
    found: dict[str, list[Run]] = {}
    variants = ["nothing", "logical", "nothing again", "no notify", "notify"]
    written(server, script, None, clients, "-T", str(seconds), *pace)
    for _ in range(rounds):
        variants.append(variants.pop(0))
        for variant in variants:
            server.run_sql("VACUUM products; CHECKPOINT")
            with prepared(server, variant) as service:
                found.setdefault(variant, []).append(
                    written(server, script, service, clients, "-T", str(seconds), *pace)
                )
        shown = {variant: runs[-1] for variant, runs in found.items()}
        print(
            "   ".join(f"{name} {run.commits_s:,.0f} {run.writers_us:.1f} µs" for name, run in shown.items()),
            flush=True,
        )
    return found


@contextmanager
def prepared(server: EmbeddedPostgres, variant: str) -> Iterator[RunningService | None]:
    """The database, and the service, as a variant needs them."""
    if variant.startswith("nothing"):
        yield None
    elif variant == "logical":
        publish(server.dsn(), _TABLE, ["id"], _PUBLICATION, False, print)
        with capturing(server) as service:
            yield service
        server.run_sql("DROP PUBLICATION cacheservice")
    else:
        watch(server.dsn(), _TABLE, ["id"], variant == "notify", False, print)
        with capturing(server, "triggers", dataset={"interval_s": 1.0} if variant == "no notify" else {}) as service:
            yield service
        unwatch(server.dsn(), _TABLE, [], False, print)
        server.run_sql("VACUUM cacheservice.changes")


def written(server: EmbeddedPostgres, script: str, service: RunningService | None, clients: int, *length: str) -> Run:
    """Run the writers. Their sessions are sampled until they end, so that less than a sample is missing."""
    has_stream = service is not None and "logical" in server.run_sql("SELECT slot_type FROM pg_replication_slots")
    others = {"walsender": walsender(server)} if has_stream else {}
    if service is not None:
        others["service"] = service.pid
    before_s = {name: scheduled_s(pid) for name, pid in others.items()}
    with tempfile.TemporaryDirectory() as folder, closing(psycopg2.connect(server.dsn())) as aside:
        path = Path(folder) / "script.sql"
        path.write_text(script)
        with pgbench(server, path, clients, *length) as process:
            computed_s: dict[int, float] = {}
            while process.poll() is None:
                if len(computed_s) < clients:
                    computed_s.update(dict.fromkeys(sessions(aside, "pgbench"), 0.0))
                for pid in computed_s:
                    with suppress(FileNotFoundError, ProcessLookupError):
                        computed_s[pid] = scheduled_s(pid)
                time.sleep(_SAMPLE_S)
            printed = process.stdout.read() if process.stdout is not None else ""
    spent_s = {name: scheduled_s(pid) - before_s[name] for name, pid in others.items()}
    commits = int(_number(r"actually processed: (\d+)", printed))
    return Run(
        _number(r"tps = ([\d.]+)", printed),
        sum(computed_s.values()) / commits * 1e6,
        spent_s.get("walsender", 0.0) / commits * 1e6,
        spent_s.get("service", 0.0) / commits * 1e6,
    )


def sessions(aside: Any, application: str) -> list[int]:
    with aside.cursor() as cursor:
        cursor.execute("SELECT pid FROM pg_stat_activity WHERE application_name = %s", (application,))
        pids = [pid for (pid,) in cursor.fetchall()]
    aside.commit()
    return pids


@contextmanager
def pgbench(server: EmbeddedPostgres, script: Path, clients: int, *length: str) -> Iterator[subprocess.Popen[str]]:
    """Ends pgbench if it still runs."""
    process = subprocess.Popen(
        [
            *(server.psql_path.with_name("pgbench"), "-n", "-c", str(clients), "-j", str(min(clients, 2)), *length),
            *("-f", script, f"host={server.socket_directory} port={server.port} user=postgres dbname=postgres"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


def writers_figures(what: str, runs: dict[str, list[Run]]) -> Iterator[Figure]:
    bare = runs["nothing"]

    def ratios(variant: str, place: int) -> list[float]:
        return [ours[place] / base[place] for ours, base in zip(runs[variant], bare, strict=True)]

    for variant in ("logical", "no notify", "notify", "nothing again"):
        name = "noise" if variant == "nothing again" else variant
        commits, cpu = ratios(variant, 0), ratios(variant, 1)
        is_ours = variant == "logical"
        yield (
            f"{what}, {name}: commits/s",
            spread(commits),
            spread([run.commits_s for run in bare], "{:,.0f}".format),
            floor(median(commits), LEAST_OF_COMMITS) if is_ours else "",
        )
        yield (
            f"{what}, {name}: writers' CPU",
            spread(cpu),
            spread([run.writers_us for run in bare], "{:.1f} µs".format),
            limit(median(cpu), MOST_OF_WRITERS, "") if is_ours else "",
        )
        if variant != "nothing again":
            service = spread([run.service_us for run in runs[variant]], "{:.1f} µs".format)
            sender = spread([run.walsender_us for run in runs[variant]], "{:.1f} µs".format)
            yield f"{what}, {name}: CPU per commit", f"service {service}", f"walsender {sender}" if is_ours else "", ""


# Commit to visible


def visible(server: EmbeddedPostgres, writer: Any, random: Random, options: argparse.Namespace) -> Iterator[Figure]:
    """Time commits, with the stream and with triggers in turns."""
    server.run_sql("CREATE SEQUENCE prices")
    migrate(server.dsn(), ROOT / "migrations")
    idle_s: dict[str, list[float]] = {"logical": [], "notify": []}
    loaded_s: dict[str, list[float]] = {"logical": [], "notify": []}
    rates: list[float] = []
    for variant in ("logical", "notify"):
        with prepared(server, variant) as service, tempfile.TemporaryDirectory() as folder:
            assert service is not None, "both have one"
            path = Path(folder) / "script.sql"
            path.write_text(_LOAD.format(first=_ASIDE + 1, last=options.rows))
            taken(service, writer, random, 5)  # the first may wait, because all rows have been read just before
            idle_s[variant] = taken(service, writer, random, options.samples)
            print(f"COMMIT to GET, {variant}, idle: {shown(idle_s[variant])}", flush=True)
            with pgbench(server, path, 4, "-R", str(options.load), "-P", "1", "-T", "3600") as process:
                time.sleep(2)
                loaded_s[variant] = taken(service, writer, random, options.samples)
                process.terminate()
                progress = process.stderr.read() if process.stderr is not None else ""
            reached = [float(rate) for rate in re.findall(r"([\d.]+) tps", progress)[1:]]
            rates += reached if variant == "logical" else []
            print(
                f"COMMIT to GET, {variant}, while {spread(reached, '{:,.0f}'.format)} rows/s change: "
                f"{shown(loaded_s[variant])}",
                flush=True,
            )
    for what, values_s in (("idle", idle_s), (f"while {median(rates):,.0f} rows/s change", loaded_s)):
        for share, most_ms in MOST_VISIBLE_MS.items():
            value_s, peer_s = (percentile(values_s[variant], share) for variant in ("logical", "notify"))
            target = limit(value_s * 1000, most_ms, " ms")
            yield f"COMMIT to GET, p{share}, {what}", ms(value_s), f"triggers with NOTIFY {ms(peer_s)}", target


def shown(values_s: list[float]) -> str:
    p50, p99 = percentile(values_s, 50), percentile(values_s, 99)
    return f"p50 {ms(p50)}, p99 {ms(p99)}, most {ms(max(values_s))}"


def taken(service: RunningService, writer: Any, random: Random, samples: int) -> list[float]:
    """Seconds from the return of COMMIT to the reply of the first GET with the new value, one each half millisecond."""
    found = []
    with closing(RespClient(service.resp_port)) as reader:
        for _ in range(samples):
            time.sleep(random.uniform(0.005, 0.020))
            key, price = random.randint(1, _ASIDE), next_price(writer)
            new = f'"price":{price}'.encode()
            with writer.cursor() as cursor:
                cursor.execute("UPDATE products SET price = %s WHERE id = %s", (price, key))
            writer.commit()
            committed_at = time.perf_counter()
            while new not in reader.ask("GET", f"products:{key}"):
                if time.perf_counter() - committed_at > _WAIT_LIMIT_S:
                    raise RuntimeError(f"products:{key} does not get its new value")
                time.sleep(_PAUSE_S)
            found.append(time.perf_counter() - committed_at)
    return found


# Rows


def rows(server: EmbeddedPostgres, writer: Any, options: argparse.Namespace) -> Iterator[Figure]:
    server.run_sql("CREATE TABLE others (LIKE products INCLUDING ALL); INSERT INTO others SELECT * FROM products")
    publish(server.dsn(), "public.others", ["id"], _PUBLICATION, False, print)
    some = options.rows * 2 // 5
    kinds = {
        f"{options.rows:,} rows that no dataset reads": ("others", options.rows),
        f"{options.rows:,} watched rows": ("products", options.rows),
        f"{some:,} watched rows": ("products", some),
    }
    found: dict[str, list[Decoded]] = {what: [] for what in kinds}
    idle: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        clocks = Path(folder) / "watch.sock"
        # Of a dataset of a few rows a read of all rows takes no time.
        dataset = {"query": f"SELECT * FROM products WHERE id <= {_ASIDE}"}
        with capturing(server, dataset=dataset, tac=_TAC, CACHESERVICE_WATCH=str(clocks)) as service:
            for _ in range(options.transactions):
                time.sleep(1)
                take(clocks)
                time.sleep(3)
                idle.append(longest(clocks))
                for what, (table, count) in kinds.items():
                    found[what].append(decoded(server, service, writer, clocks, table, count))
                    print(f"{what}: {found[what][-1]}", flush=True)
                    server.run_sql(f"VACUUM {table}; CHECKPOINT")
    for what, each in found.items():
        us = [one.service_us for one in each]
        sender = spread([one.walsender_us for one in each], "{:.2f} µs".format)
        target = limit(median(us), MOST_ROW_US, " µs")
        yield f"CPU of the service per row, {what}", spread(us, "{:.2f} µs".format), f"walsender {sender}", target
        for clock, name in CLOCKS.items():
            value = [one.longest_s[clock] for one in each]
            most = limit(median(value) * 1000, MOST_STALL_MS, " ms") if clock != "wall_s" else ""
            yield (
                f"longest turn, {name}, {what}",
                spread(value, ms),
                f"idle {spread([o[clock] for o in idle], ms)}",
                most,
            )


def longest(clocks: Path) -> dict[str, float]:
    return {clock: turn[clock] for clock, turn in take(clocks).items()}


def decoded(
    server: EmbeddedPostgres, service: RunningService, writer: Any, clocks: Path, table: str, count: int
) -> Decoded:
    """One transaction, until the service has confirmed that it has all of it."""
    sender = walsender(server)
    sender_before_s = scheduled_s(sender)  # it reads the log before the end of the transaction
    with writer.cursor() as cursor:
        cursor.execute(f"UPDATE {table} SET stock = stock + 1 WHERE id <= {count}")
        before_s = scheduled_s(service.pid)
        take(clocks)
        writer.commit()
        cursor.execute("SELECT pg_current_wal_lsn()")
        ((lsn,),) = cursor.fetchall()
        writer.commit()
        limit_at = time.monotonic() + _WAIT_LIMIT_S
        while True:
            cursor.execute("SELECT bool_and(confirmed_flush_lsn >= %s) FROM pg_replication_slots", (lsn,))
            ((is_known,),) = cursor.fetchall()
            writer.commit()
            if is_known:
                break
            if time.monotonic() > limit_at:
                raise RuntimeError("the service does not get so far")
            time.sleep(_POLL_S)
        spent_s, sender_s = scheduled_s(service.pid) - before_s, scheduled_s(sender) - sender_before_s
        time.sleep(0.5)  # until the kept keys are used and freed
        service.wait_refreshed()
    return Decoded(spent_s / count * 1e6, sender_s / count * 1e6, longest(clocks))


if __name__ == "__main__":
    main()
