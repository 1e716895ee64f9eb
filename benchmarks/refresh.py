"""Rows a second of first and further reads, against psql's \\copy of the same rows from the same server, in turns."""

from __future__ import annotations

import argparse
import re
import subprocess
from statistics import median

from benchmarks.figures import floor, print_figures, spread
from benchmarks.products import server_with_products
from benchmarks.service import cpu_s, running_service
from cacheservice.cli.embedded import EmbeddedPostgres

LEAST_RATIO = 0.7

_COPY = r"\copy (select id::text, row_to_json(t)::text from products t) to /dev/null"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    with server_with_products(options.rows) as server:
        copy_s(server)
        pairs = {"first": Reads(), "further": Reads()}
        for _ in range(options.pairs):
            with running_service(server.dsn()) as service:
                for name, reads in pairs.items():
                    computed_s = 0.0 if name == "first" else cpu_s(service.pid)
                    if name == "further":
                        service.start_refresh()
                    attempt = service.wait_refreshed()
                    assert attempt["rows"] == options.rows
                    reads.computed_s.append(cpu_s(service.pid) - computed_s)
                    reads.ours.append(options.rows / attempt["took_s"])
                    reads.theirs.append(options.rows / copy_s(server))
                    print(f"{name:8} {reads.last}", flush=True)
    print()
    print_figures([row for name, reads in pairs.items() for row in reads.figures(name)])


class Reads:
    """Rows a second of some reads, and of psql after each; and what the service computed."""

    def __init__(self) -> None:
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.computed_s: list[float] = []

    @property
    def last(self) -> str:
        """The last pair."""
        ours, theirs = self.ours[-1], self.theirs[-1]
        return f"refresh {ours:,.0f} rows/s   psql {theirs:,.0f} rows/s   {ours / theirs:.2f}"

    def figures(self, name: str) -> list[tuple[str, str, str, str]]:
        """The rows of the table."""
        ratios = [our / their for our, their in zip(self.ours, self.theirs, strict=True)]
        theirs = f"psql {spread(self.theirs, '{:,.0f}'.format)}"
        return [
            (f"{name} read, rows/s", spread(self.ours, "{:,.0f}".format), theirs, ""),
            ("  ratio of each pair", spread(ratios), "psql \\copy", floor(median(ratios), LEAST_RATIO)),
            ("  CPU of the service, s", spread(self.computed_s), "", ""),
        ]


def copy_s(server: EmbeddedPostgres) -> float:
    """Seconds by psql's own clock, so that its start and its connect do not count; ours do not either."""
    finished = subprocess.run(
        [server.psql_path, "-X", "-d", server.dsn(), "-c", r"\timing on", "-c", _COPY],
        capture_output=True,
        text=True,
        check=True,
    )
    timing = re.search(r"Time: ([\d.]+) ms", finished.stdout)
    assert timing is not None, finished.stdout
    return float(timing[1]) / 1000


if __name__ == "__main__":
    main()
