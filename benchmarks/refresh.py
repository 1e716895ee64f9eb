"""Rows a second of a refresh, against psql's \\copy of the same rows from the same server, in turns."""

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
    with server_with_products(options.rows) as server, running_service(server.dsn()) as service:
        copy_s(server)
        ours, theirs, computed = [], [], []
        for _ in range(options.pairs):
            before_s = cpu_s(service.pid)
            service.start_refresh()
            attempt = service.wait_refreshed()
            assert attempt["rows"] == options.rows
            computed.append(cpu_s(service.pid) - before_s)
            ours.append(options.rows / attempt["took_s"])
            theirs.append(options.rows / copy_s(server))
            print(
                f"refresh {ours[-1]:,.0f} rows/s   psql {theirs[-1]:,.0f} rows/s   {ours[-1] / theirs[-1]:.2f}",
                flush=True,
            )
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    print()
    print_figures(
        [
            ("refresh, rows/s", spread(ours, "{:,.0f}".format), f"psql {spread(theirs, '{:,.0f}'.format)}", ""),
            ("ratio of each pair", spread(ratios), "psql \\copy", floor(median(ratios), LEAST_RATIO)),
            ("CPU of a refresh in the service, s", spread(computed), "", ""),
        ]
    )


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
