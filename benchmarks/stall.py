"""How long a refresh of a million rows keeps the reactor from everything else, and what `ruok` takes meanwhile."""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.figures import limit, ms, percentile, print_figures, spread
from benchmarks.products import server_with_products
from benchmarks.service import RunningService, running_service

# The clocks of stall.tac: see Watch there.
CLOCKS = {"cpu_s": "CPU", "own_s": "wall less waits for a core", "wall_s": "wall"}
MOST_STALL_S = 0.010
MOST_RUOK_S = 0.005

_TAC = Path(__file__).with_name("stall.tac")
_PAUSE_S = 0.005
_AFTER_S = 1.0
"""Long enough for the generation that was replaced to be freed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, server_with_products(options.rows) as server:
        watch = Path(directory) / "watch.sock"
        # A variable without "__" is not a setting.
        with running_service(server.dsn(), tac=_TAC, CACHESERVICE_WATCH=str(watch)) as service:
            time.sleep(_AFTER_S)
            measured = [(idle(service, watch), refreshing(service, watch)) for _ in range(options.pairs)]
    print()
    print_figures(figures(measured))


Taken = dict[str, dict[str, float]]
Sample = tuple[list[float], Taken]


def idle(service: RunningService, watch: Path) -> Sample:
    """Seconds of `ruok`, and the longest turns of the reactor, over two seconds in which nothing else happens."""
    take(watch)
    ruok_s = []
    end = time.monotonic() + 2
    while time.monotonic() < end:
        ruok_s.append(timed_ruok(service))
    taken = take(watch)
    tell("idle", ruok_s, taken)
    return ruok_s, taken


def refreshing(service: RunningService, watch: Path) -> Sample:
    """The same from before a refresh begins until what it replaced is freed."""
    take(watch)
    service.start_refresh()
    ruok_s = []
    for _ in range(10_000):
        # `json` is asked rarely, to see the end.
        ruok_s += [timed_ruok(service) for _ in range(20)]
        if not service.products()["refreshing"]:
            break
    end = time.monotonic() + _AFTER_S
    while time.monotonic() < end:
        ruok_s.append(timed_ruok(service))
    service.wait_refreshed()
    taken = take(watch)
    tell("refresh", ruok_s, taken)
    return ruok_s, taken


def timed_ruok(service: RunningService) -> float:
    """Seconds from connecting to the end of the reply."""
    time.sleep(_PAUSE_S)
    asked_at = time.perf_counter()
    assert service.ask("ruok") == "imok"
    return time.perf_counter() - asked_at


def take(watch: Path) -> Taken:
    """What was noted since the last call."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(watch))
        client.sendall(b"\n")
        with client.makefile("rb") as reply:
            taken: Taken = json.loads(reply.readline())
    return taken


def tell(what: str, ruok_s: list[float], taken: Taken) -> None:
    by_clock = ", ".join(f"{name} {ms(taken[clock][clock])}" for clock, name in CLOCKS.items())
    print(
        f"{what:8} longest turn: {by_clock} (at {taken['cpu_s']['after_s']:.2f} s); "
        f"ruok p50 {ms(percentile(ruok_s, 50))}, p99 {ms(percentile(ruok_s, 99))}, most {ms(max(ruok_s))}",
        flush=True,
    )


def figures(measured: list[tuple[Sample, Sample]]) -> list[tuple[str, str, str, str]]:
    """Of each run the longest turn, and `ruok`; the targets are for the medians of the runs."""

    def row(what: str, value: Callable[[Sample], float], most_s: float | None) -> tuple[str, str, str, str]:
        busy, quiet = [value(pair[1]) for pair in measured], [value(pair[0]) for pair in measured]
        target = "" if most_s is None else limit(median(busy) * 1000, most_s * 1000, " ms")
        return what, spread(busy, ms), f"idle {spread(quiet, ms)}", target

    def longest(clock: str) -> Callable[[Sample], float]:
        return lambda sample: sample[1][clock][clock]

    return [
        *(row(f"longest turn, {name}", longest(clock), MOST_STALL_S) for clock, name in CLOCKS.items()),
        row("ruok p50", lambda sample: percentile(sample[0], 50), None),
        row("ruok p99", lambda sample: percentile(sample[0], 99), MOST_RUOK_S),
        row("longest ruok", lambda sample: max(sample[0]), MOST_STALL_S),
    ]


if __name__ == "__main__":
    main()
