"""What deltas bring: how soon a commit is read, and what a few changed rows cost, whatever the size of the table.

The table is watched, with NOTIFY, so that each commit starts a delta. `took_s` is that of the service's log, to the
millisecond. Database time is the CPU time of all sessions of the service, to the nanosecond, by the kernel's schedstat.
"""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any, NamedTuple

import hiredis
import psycopg2

from benchmarks import plots
from benchmarks.figures import limit, mib, ms, percentile, print_figures, spread
from benchmarks.products import server_with_products
from benchmarks.service import ROOT, RunningService, memory_bytes, running_service, scheduled_s
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.watch import watch

MOST_VISIBLE_S = {50: 0.010, 99: 0.050}
MOST_RATIO = 0.01
MOST_GROWTH = 1.5
MOST_PROBE_S = 0.003

_TABLE = "public.products"
_WATCHED = {"watch": [{"table": _TABLE, "key": "id"}]}
_PROBED = {"probe": "SELECT max(updated_at) FROM products", "interval_s": 0.05}
_PROBES_AT_ONCE = 20
_WAIT_LIMIT_S = 10.0
_PAUSE_S = 0.0005
"""Without it the reader and the service keep two cores busy, and the database's sessions wait for one."""
_BAR = 50
"""Characters."""

Figure = tuple[str, str, str, str]


class Cost(NamedTuple):
    """Of one refresh: by the service's log, of its sessions at the server, of itself, and how far its memory rose."""

    took_s: float
    database_s: float
    service_s: float
    rise_bytes: int


class Measured(NamedTuple):
    """At one size of the table."""

    deltas: list[Cost]
    wholes: list[Cost]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="for all but the sizes")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 3_000_000])
    parser.add_argument("--samples", type=int, default=500, help="commits, for each kind of reader")
    parser.add_argument("--keys", type=int, default=100, help="that change at once")
    parser.add_argument("--deltas", type=int, default=60, help="of so many keys, at each size")
    parser.add_argument("--wholes", type=int, default=3, help="reads of all rows, in turns with the deltas")
    parser.add_argument("--probes", type=int, default=20, help=f"means of {_PROBES_AT_ONCE}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the pictures there; needs the extra `bench`")
    parser.add_argument("--quick", action="store_true", help="only to see that all of it works")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.sizes = 10_000, [1000, 10_000]
        options.samples, options.deltas, options.wholes, options.probes = 30, 6, 2, 2
    random = Random(options.seed)
    by_size: dict[int, Measured] = {}
    readers: dict[str, list[float]] = {}
    probes: list[tuple[float, float]] = []
    for rows in sorted({*options.sizes, options.rows}):
        with watched_server(rows) as server, closing(psycopg2.connect(server.dsn())) as writer:
            with running_service(server.dsn(), dataset=_WATCHED) as service:
                settle(service)
                by_size[rows] = measured(service, writer, rows, random, options)
                if rows == options.rows:
                    for name, told in (("is told of it", True), ("asks each half millisecond", False)):
                        readers[name] = visible(service, writer, rows, random, options.samples, told=told)
            if rows == options.rows:
                probes = probed(server, writer, options.probes)
    for name, values_s in readers.items():
        print(f"\nA reader that {name} has the new value after the return of COMMIT, of {len(values_s)} commits:\n")
        print_histogram(values_s)
    print()
    print_figures(
        [
            *visible_figures(readers),
            *ratio_figures(by_size[options.rows], options.keys),
            *size_figures({rows: by_size[rows] for rows in sorted(options.sizes)}, options.keys),
            *probe_figures(probes),
        ]
    )
    if options.plots is not None:
        plots.visible(options.plots / "deltas-visible.svg", readers, MOST_VISIBLE_S)
        deltas = {rows: [cost.took_s for cost in each.deltas] for rows, each in by_size.items()}
        wholes = {rows: [cost.took_s for cost in each.wholes] for rows, each in by_size.items()}
        plots.over_size(options.plots / "deltas-size.svg", deltas, wholes, options.keys)


@contextmanager
def watched_server(rows: int) -> Iterator[EmbeddedPostgres]:
    with server_with_products(rows) as server:
        migrate(server.dsn(), ROOT / "migrations")
        watch(server.dsn(), _TABLE, ["id"], notify=True, dry_run=False, show=print)
        server.run_sql("CREATE SEQUENCE prices")
        yield server


def settle(service: RunningService) -> None:
    """Wait until it listens, and has looked for what it may have missed before."""
    service.wait_event("listening_began")
    time.sleep(0.5)
    service.wait_refreshed()


# Commit to visible


class RespClient:
    """A connection to the RESP port that waits for each reply."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), _WAIT_LIMIT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()

    def ask(self, *words: str) -> Any:
        self._socket.sendall(hiredis.pack_command(words))  # type: ignore[arg-type]  # its stub: of one word
        return self.reply()

    def reply(self) -> Any:
        """The next one, or the next message.

        :raises TimeoutError: if it does not come.
        """
        while (reply := self._reader.gets()) is False:
            if not (part := self._socket.recv(65_536)):
                raise RuntimeError("the service has closed the connection")
            self._reader.feed(part)
        return reply

    def close(self) -> None:
        self._socket.close()


def visible(
    service: RunningService, writer: Any, rows: int, random: Random, samples: int, *, told: bool
) -> list[float]:
    """Seconds from the return of COMMIT to the reply of the first GET that has the new value.

    :param told: whether the reader sends a GET after each message of a publish, and leaves the service alone else;
        or a GET, a pause, and the next one.
    """
    taken = []
    with closing(RespClient(service.resp_port)) as reader, closing(RespClient(service.resp_port)) as subscriber:
        subscriber.ask("SUBSCRIBE", "cache:products")
        for _ in range(samples):
            time.sleep(random.uniform(0.005, 0.020))
            key, price = random.randint(1, rows), next_price(writer)
            shown = f'"price":{price}'.encode()
            with writer.cursor() as cursor:
                cursor.execute("UPDATE products SET price = %s WHERE id = %s", (price, key))
            writer.commit()
            committed_at = time.perf_counter()
            while True:
                if told:
                    subscriber.reply()
                if shown in reader.ask("GET", f"products:{key}"):
                    break
                if not told:
                    time.sleep(_PAUSE_S)
                if time.perf_counter() - committed_at > _WAIT_LIMIT_S:
                    raise RuntimeError(f"products:{key} does not get its new value")
            taken.append(time.perf_counter() - committed_at)
            if not told:
                subscriber.reply()  # its message, so that none are left unread
    return taken


def next_price(writer: Any) -> str:
    """One that no row has had yet."""
    with writer.cursor() as cursor:
        cursor.execute("SELECT nextval('prices')")
        ((number,),) = cursor.fetchall()
    writer.commit()
    return f"{1_000_000 + number}.00"


def print_histogram(values_s: Sequence[float]) -> None:
    """A line for each millisecond up to the last percent."""
    most = max(1, int(percentile(values_s, 99) * 1000) + 1)
    counts = [0] * (most + 1)
    for value in values_s:
        counts[min(most, int(value * 1000))] += 1
    for number, count in enumerate(counts):
        what = f"{number:3} to {number + 1:3} ms" if number < most else f"{most:3} ms or more"
        print(f"{what:14} {count:4} {'█' * round(count / max(counts) * _BAR)}")
    p50, p99, most_s = percentile(values_s, 50), percentile(values_s, 99), max(values_s)
    print(f"p50 {ms(p50)}, p99 {ms(p99)}, most {ms(most_s)}", flush=True)


# What it costs


def measured(
    service: RunningService,
    writer: Any,
    rows: int,
    random: Random,
    options: argparse.Namespace,
) -> Measured:
    """Deltas of so many random keys, and between them, evenly, a read of all rows."""
    deltas: list[Cost] = []
    wholes: list[Cost] = []
    keys = min(options.keys, rows)

    def change() -> None:
        with writer.cursor() as cursor:
            some = random.sample(range(1, rows + 1), keys)
            cursor.execute("UPDATE products SET price = %s WHERE id = ANY (%s)", (price, some))
        writer.commit()

    for number in range(options.deltas):
        if number * options.wholes // options.deltas == len(wholes):
            wholes.append(cost(service, writer, service.start_refresh, "all rows, because it is a check of the deltas"))
            time.sleep(0.5)  # until what was replaced is freed
        time.sleep(random.uniform(0.02, 0.05))
        price = next_price(writer)
        deltas.append(cost(service, writer, change, f"a delta of {keys} keys"))
    took = f"{ms(median(each.took_s for each in deltas))}, all rows {ms(median(each.took_s for each in wholes))}"
    print(f"{rows:,} rows: a delta of {keys} keys {took}\n", flush=True)
    return Measured(deltas, wholes)


def cost(service: RunningService, writer: Any, begin: Any, how: str) -> Cost:
    """Of the refresh that `begin` brings about.

    :raises RuntimeError: if it is not the one that was expected.
    """
    service.events()
    # 5 sets VmHWM back to what is in use now (proc(5)).
    Path(f"/proc/{service.pid}/clear_refs").write_text("5")
    memory_before = memory_bytes(service.pid, "VmHWM")
    before_s, own_before_s = sessions_s(writer), scheduled_s(service.pid)
    begin()
    event = service.wait_event("refresh_published" if "delta" in how else "refresh_unchanged")
    if event["read"] != how:
        raise RuntimeError(f"{how} was expected, not {event['read']}")
    database_s = sum(after_s - before_s.get(pid, 0.0) for pid, after_s in sessions_s(writer).items())
    service_s = scheduled_s(service.pid) - own_before_s
    return Cost(event["took_s"], database_s, service_s, memory_bytes(service.pid, "VmHWM") - memory_before)


def sessions_s(aside: Any) -> dict[int, float]:
    """Seconds that each session of the service has computed at the server; `aside` is one of ours."""
    with aside.cursor() as cursor:
        cursor.execute("SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'cacheservice%'")
        pids = [pid for (pid,) in cursor.fetchall()]
    aside.commit()
    return {pid: scheduled_s(pid) for pid in pids}


def probed(server: EmbeddedPostgres, writer: Any, samples: int) -> list[tuple[float, float]]:
    """Database seconds and `took_s` of refreshes that the probe ends, each the mean of some."""
    server.run_sql("CREATE INDEX ON products (updated_at); ANALYZE products")
    means = []
    with running_service(server.dsn(), dataset=_PROBED) as service:
        service.wait_event("refresh_unchanged")
        for _ in range(samples):
            service.wait_event("refresh_unchanged")
            before_s = sessions_s(writer)
            took: list[float] = []
            while len(took) < _PROBES_AT_ONCE:
                took += [each["took_s"] for each in service.events() if each["event"] == "refresh_unchanged"]
                time.sleep(0.005)
            computed_s = sum(after_s - before_s.get(pid, 0.0) for pid, after_s in sessions_s(writer).items())
            means.append((computed_s / len(took), sum(took) / len(took)))
    return means


# Figures


def visible_figures(readers: dict[str, list[float]]) -> Iterator[Figure]:
    for name, values_s in readers.items():
        for share, most_s in MOST_VISIBLE_S.items():
            value_s = percentile(values_s, share)
            target = limit(value_s * 1000, most_s * 1000, " ms")
            yield f"COMMIT to GET, p{share}, a reader that {name}", ms(value_s), "", target


def ratio_figures(measured: Measured, keys: int) -> Iterator[Figure]:
    deltas, wholes = measured
    for what, place, show in (("took_s", 0, whole_ms), ("database time", 1, ms)):
        some, whole = [each[place] for each in deltas], [each[place] for each in wholes]
        yield f"{what} of a delta of {keys} keys", spread(some, show), f"all rows {spread(whole, show)}", ""
        ratio = median(some) / median(whole)
        yield "ratio of the medians", f"1/{1 / ratio:,.0f}", "", limit(ratio, MOST_RATIO, "")


def size_figures(by_size: dict[int, Measured], keys: int) -> Iterator[Figure]:
    sizes = list(by_size)

    def at_each_size(what: str, place: int, show: Callable[[float], str]) -> Iterator[Figure]:
        for rows, (deltas, wholes) in by_size.items():
            some, whole = [each[place] for each in deltas], [each[place] for each in wholes]
            yield f"{what}, {rows:,} rows", spread(some, show), f"all rows {spread(whole, show)}", ""

    def growth(what: str, place: int) -> tuple[str, float]:
        least, most = (middle([each[place] for each in by_size[rows].deltas]) for rows in (sizes[0], sizes[-1]))
        return f"{what} at {sizes[-1]:,} rows / at {sizes[0]:,}", most / least

    yield from at_each_size(f"took_s of a delta of {keys} keys", 0, whole_ms)
    what, ratio = growth("took_s", 0)
    yield what, f"{ratio:.2f}", "", limit(ratio, MOST_GROWTH, "")
    yield from at_each_size("its database time", 1, ms)
    what, ratio = growth("database time", 1)
    yield what, f"{ratio:.2f}", "", ""
    yield from at_each_size("its CPU time in the service", 2, ms)
    yield from at_each_size("memory's peak less what there was before", 3, mib)


def middle(values: Sequence[float]) -> float:
    """The mean of the middle half: what a median is for, but finer than the milliseconds that are rounded to."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return mean(ordered[quarter : len(ordered) - quarter])


def whole_ms(value_s: float) -> str:
    return f"{value_s * 1000:,.0f} ms"


def probe_figures(probes: Sequence[tuple[float, float]]) -> Iterator[Figure]:
    computed, took = zip(*probes, strict=True)
    target = limit(median(computed) * 1000, MOST_PROBE_S * 1000, " ms")
    yield "database time of an unchanged probe", spread(computed, ms), f"took_s {spread(took, ms)}", target


if __name__ == "__main__":
    main()
