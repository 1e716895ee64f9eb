"""Faults of every kind, for as long as is asked, around the real service whose every answer is checked.

Half of the time one process has to stand all that does not end it; then it is killed, restarted and its files damaged
as well. After that: a process that may have 64 descriptors, saves that are killed at random moments, files with a
changed byte or cut off, a fleet with workers (`benchmarks/soak_fleet.py`), and the tests that draw their inputs, with
new seeds, which are printed. `tests/kit/faults.py` describes the checks, and runs a short version of them in the tests.
It needs root, for a small file system that fills and for network namespaces, and a C compiler, for a clock that can be
turned.
"""

from __future__ import annotations

import argparse
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from tabulate import tabulate
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from benchmarks.figures import mib
from benchmarks.soak_fleet import FLEET_HEADERS, fleet_faults, fleet_table
from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.faults import ENDING, MUST_BE_0, RECOVERY_LIMIT_S, Counts, Shelf, Storm, Struck, flood, possible, storm

MOST_HOLD_S = 8.0
DAMAGED = "process: killed, its newest file damaged"
FROZEN = "database: all of it frozen"
FLOOD = "clients: more than descriptors"
SIXTY_FOUR = ("sh", "-c", 'ulimit -n 64; exec "$0" "$@"')

_DRAWN = (
    "tests/test_fuzz.py",
    "tests/test_deltas.py",
    "tests/test_watch.py",
    "tests/unit/test_deltas.py",
    "tests/unit/test_resp_requests.py",
)
_KILL_ROWS = 20_000
_KILL_WITHIN_S = 0.15
_FLOODS = 5
_DATABASE = "storm"

Table = tuple[str, list[tuple[str, ...]], tuple[str, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of random faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--freeze", type=float, default=60.0, help="seconds that the server is frozen once")
    parser.add_argument("--kills", type=int, default=500, help="of a process that saves")
    parser.add_argument("--corruptions", type=int, default=1000, help="single bytes of a saved file")
    parser.add_argument("--starts", type=int, default=20, help="of the whole service with a damaged file")
    parser.add_argument("--fleet-minutes", type=float, default=10.0, help="of random faults of a fleet")
    parser.add_argument("--draws", type=int, default=1, help="runs of the tests that draw their inputs, with new seeds")
    parser.add_argument("--report", type=Path, help="a Markdown file to write")
    options = parser.parse_args()
    reactor.seconds = time.monotonic
    print(f"seed {options.seed}", flush=True)
    random, counts, began_at = Random(options.seed), Counts(), time.monotonic()
    storms = stormy(options, random, counts)
    on_files(options, random, counts)
    fleet = fleet_faults(options.fleet_minutes, random)
    for problem in fleet.problems:
        counts.add("fleet", problem)
    failed = [seed for seed in (secrets.randbelow(2**32) for _ in range(options.draws)) if not drawn(seed)]
    tables = report(storms, counts, time.monotonic() - began_at)
    tables.append(("Recoveries of the fleet", fleet_table(fleet), FLEET_HEADERS))
    bad = counts.bad()
    for title, rows, headers in tables:
        print(f"\n{title}\n{tabulate(rows, headers, disable_numparse=True)}")
    for what, (_, examples) in bad.items():
        print(f"\n{MUST_BE_0[what]}:", *examples, sep="\n  ")
    if options.report is not None:
        options.report.write_text(markdown(tables, bad, options))
    if failed:
        print(f"\nThe tests that draw their inputs failed with these seeds: {failed}")
    sys.exit(1 if bad or failed else 0)


# The service


def stormy(options: argparse.Namespace, random: Random, counts: Counts) -> list[Storm]:
    """Both storms, when they are over."""
    directory = Path(tempfile.mkdtemp(prefix="cacheservice-soak-"))
    server = EmbeddedPostgres(directory)
    try:
        server.start()
        server.create_database(_DATABASE)
        with storm(server, _DATABASE, random, counts=counts) as first:
            if first.clock is None:
                raise SystemExit("a C compiler is needed to turn the clock: apt-get install gcc libc6-dev")
            faults(first, options)
            first.finish()
        server.run_sql(f"DROP DATABASE {_DATABASE} WITH (FORCE)")
        server.create_database(_DATABASE)
        with storm(server, _DATABASE, random, counts=counts, before=SIXTY_FOUR) as second:
            second.measure()
            for _ in range(_FLOODS):
                tell(second.strike(FLOOD, random.uniform(2.0, MOST_HOLD_S), flood))
            second.finish()
    except PermissionError as error:
        raise SystemExit(str(error)) from None
    finally:
        server.stop("immediate")
        shutil.rmtree(directory)
    return [first, second]


def faults(made: Storm, options: argparse.Namespace) -> None:
    """First those that one process has to withstand, then all of them, each half of the time."""
    names = possible(made)
    lasting = [name for name in names if name not in ENDING]
    half_s = options.minutes * 60 / 2
    made.measure()
    tell(made.strike(FROZEN, options.freeze))
    at_random(made, lasting, half_s)
    for name in ENDING:
        tell(made.strike(name, made.random.uniform(0.5, 2.0)))
    made.measure()
    at_random(made, [*lasting, *ENDING], half_s)
    for _ in range(options.starts):
        tell(made.strike(DAMAGED, 0.2))


def at_random(made: Storm, names: Sequence[str], during_s: float) -> None:
    """All of them in random order, again and again."""
    ends_at = time.monotonic() + during_s
    left: list[str] = []
    while time.monotonic() < ends_at:
        if not left:
            left = made.random.sample(names, len(names))
        tell(made.strike(left.pop(), made.random.uniform(0.2, MOST_HOLD_S)))


def tell(struck: Struck) -> None:
    recovered = "never" if struck.recovery_s is None else f"after {struck.recovery_s:.2f} s"
    print(f"{struck.name}, {struck.held_s:.1f} s: fresh again {recovered}", flush=True)


# Its files


def on_files(options: argparse.Namespace, random: Random, counts: Counts) -> None:
    directory = Path(tempfile.mkdtemp(prefix="cacheservice-soak-"))
    failed: list[Any] = []

    async def run() -> None:
        print(f"{options.kills} kills of a process that saves …", flush=True)
        await Shelf(directory / "killed", random, counts).kill(options.kills, _KILL_ROWS, _KILL_WITHIN_S)
        print(f"{options.corruptions} single bytes of a file, and its end cut off at every 4 KB …", flush=True)
        await Shelf(directory / "damaged", random, counts).damage(options.corruptions, 4096, 2500)

    def begin() -> None:
        ended = Deferred.fromCoroutine(run())
        ended.addErrback(failed.append)
        ended.addBoth(lambda _: reactor.stop())

    try:
        reactor.callWhenRunning(begin)
        reactor.run()
    finally:
        shutil.rmtree(directory)
    if failed:
        sys.exit(failed[0].getTraceback())


# The tests that draw their inputs


def drawn(seed: int) -> bool:
    """Run the tests that draw their inputs with new ones; True if they passed."""
    seeds = {"FUZZ_SEED": f"{seed:08x}", "CACHESERVICE_TEST_DELTAS_SEED": str(seed), "TESTS_RANDOM": "1"}
    print("pytest with", " ".join(f"{name}={value}" for name, value in seeds.items()), "…", flush=True)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", f"--hypothesis-seed={seed}", *_DRAWN]
    return not subprocess.run(command, check=False, env=os.environ | seeds).returncode


# What came of it


def report(storms: Sequence[Storm], counts: Counts, took_s: float) -> list[Table]:
    struck = [each for made in storms for each in made.struck]
    limit_s = storms[0].interval_s + RECOVERY_LIMIT_S
    return [
        ("What must be 0", [(words, f"{counts[what]:,}") for what, words in MUST_BE_0.items()], ("", "count")),
        ("Recoveries", recoveries(struck, limit_s), ("fault", "times", "median", "p99", "longest", f"≤ {limit_s:g} s")),
        ("Begin and end of a life", lives(storms), ("life", "lasted", "descriptors", "threads", "memory")),
        ("How much of it there was", list(amounts(storms, counts, took_s)), ("", "")),
    ]


def recoveries(struck: Sequence[Struck], limit_s: float) -> list[tuple[str, ...]]:
    by_name: dict[str, list[float]] = {}
    for each in struck:
        by_name.setdefault(each.name, []).append(float("inf") if each.recovery_s is None else each.recovery_s)
    by_name = dict(sorted(by_name.items()))
    by_name["all"] = [each_s for some in by_name.values() for each_s in some]
    return [shown(name, sorted(some), limit_s) for name, some in by_name.items()]


def shown(name: str, sorted_s: Sequence[float], limit_s: float) -> tuple[str, ...]:
    times = (median(sorted_s), sorted_s[len(sorted_s) * 99 // 100], sorted_s[-1])
    met = "met" if sorted_s[-1] <= limit_s else "MISSED"
    return name, str(len(sorted_s)), *(f"{each:.2f} s" for each in times), met


def lives(storms: Sequence[Storm]) -> list[tuple[str, ...]]:
    """Those that were measured at both ends."""
    return [
        (
            f"{'64 descriptors, ' if made.before else ''}number {life.number}",
            f"{life.measured_again_at - life.began_at:.0f} s",
            f"{life.first.descriptors} to {life.last.descriptors}",
            f"{life.first.threads} to {life.last.threads}",
            f"{mib(life.first.memory_bytes)} to {mib(life.last.memory_bytes)}",
        )
        for made in storms
        for life in made.lives
        if life.first is not None and life.last is not None
    ]


def amounts(storms: Sequence[Storm], counts: Counts, took_s: float) -> Iterator[tuple[str, ...]]:
    alive = [life for made in storms for life in made.lives]
    yield "minutes in all", f"{took_s / 60:.1f}"
    yield "answers checked", f"{counts['answers']:,}"
    yield "versions of the tables", f"{sum(len(each.versions) for made in storms for each in made.ledgers.values()):,}"
    yield "faults", f"{sum(len(made.struck) for made in storms):,}"
    yield "processes of the service", f"{len(alive):,}"
    for event in ("refresh_published", "refresh_held", "refresh_failed", "snapshot_saved", "snapshot_save_failed"):
        yield event, f"{sum(life.events[event] for life in alive):,}"
    for event in ("snapshot_restored", "snapshot_rejected", "group_not_restored"):
        yield event, f"{sum(life.events[event] for life in alive):,}"
    yield "reads cut off by an end of the process", f"{counts['reads cut off by an end of the process']:,}"
    yield "lines of the log about descriptors", f"{counts['lines of the log about descriptors']:,}"
    for what in ("kills", "kills that loaded the old generation", "kills that loaded the new generation"):
        yield what, f"{counts[what]:,}"
    yield "single bytes changed", f"{counts['corruptions']:,}"
    yield "files cut off", f"{counts['truncations']:,}"


def markdown(tables: Sequence[Table], bad: dict[str, tuple[int, list[str]]], options: argparse.Namespace) -> str:
    machine = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    command = f"python -m benchmarks.soak --minutes {options.minutes:g} --seed {options.seed} --kills {options.kills}"
    parts = [f"# Soak\n\n`{command}`, {datetime.now(UTC):%d %B %Y}, {machine}: {'FAILED' if bad else 'passed'}."]
    parts += [
        f"## {title}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}"
        for title, rows, headers in tables
    ]
    parts += [
        f"## {MUST_BE_0[what]}\n\n" + "\n".join(f"- `{each}`" for each in some) for what, (_, some) in bad.items()
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
