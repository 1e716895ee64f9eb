"""Reads over the Redis protocol: the same keys and documents, the same client, Redis 7 and the service in turns."""

from __future__ import annotations

import argparse
import csv
import io
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from statistics import median
from typing import NamedTuple

import psycopg2

from benchmarks.figures import floor, limit, print_figures, spread
from benchmarks.memory import redis_program, set_all
from benchmarks.products import server_with_products
from benchmarks.service import RunningService, running_service
from cacheservice.cli.embedded import EmbeddedPostgres

# redis-benchmark writes its random numbers with twelve digits.
QUERY = "SELECT lpad((id - 1)::text, 12, '0') AS id, sku, name, price, stock, category, updated_at FROM products"
LEAST_RATIO = {1: 0.85, 16: 0.8, 64: 0.9}
MOST_P99_RATIO = 2.0

_CLIENTS = 50
_REQUESTS = {1: 200_000, 16: 1_000_000, 64: 2_000_000}
_HASH_ROWS = 100_000
_BATCH_ROWS = 1000


class Read(NamedTuple):
    """The output of redis-benchmark: requests per second, and the 99th percentile of the latency in milliseconds."""

    per_s: float
    p99_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    rows: list[tuple[str, str, str, str]] = []
    with (
        server_with_products(options.rows) as server,
        redis_with_rows(server, QUERY) as redis_port,
        running_service(server.dsn(), QUERY) as service,
    ):
        for pipeline, least in LEAST_RATIO.items():
            pairs = [
                (benchmark(service.resp_port, options.rows, pipeline), benchmark(redis_port, options.rows, pipeline))
                for _ in range(options.pairs)
            ]
            ratios = [ours.per_s / theirs.per_s for ours, theirs in pairs]
            what = f"GET per second, pipeline {pipeline}"
            rows.append((what, *spreads([ours.per_s for ours, _ in pairs], [theirs.per_s for _, theirs in pairs])))
            rows.append(("ratio of each pair", spread(ratios), "", floor(median(ratios), least)))
        rows += while_refreshing(service, options.rows, options.pairs)
    small = f"{QUERY} WHERE id <= {_HASH_ROWS}"
    with (
        server_with_products(options.rows) as server,
        redis_with_hash(server, small) as redis_port,
        running_service(server.dsn(), small) as service,
    ):
        rows += whole_datasets(service, redis_port, options.pairs)
    print_figures(rows)


def spreads(ours: list[float], theirs: list[float]) -> tuple[str, str, str]:
    return spread(ours, "{:,.0f}".format), f"Redis {spread(theirs, '{:,.0f}'.format)}", ""


def benchmark(port: int, keys: int, pipeline: int, requests: int | None = None) -> Read:
    """GETs of random keys by redis-benchmark."""
    command = ["redis-benchmark", "-p", port, "-c", _CLIENTS, "-P", pipeline, "-r", keys, "--csv"]
    command += ["-n", requests or _REQUESTS[pipeline], "get", "products:__rand_int__"]
    printed = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout
    (row,) = csv.DictReader(io.StringIO(printed))
    return Read(float(row["rps"]), float(row["p99_latency_ms"]))


def while_refreshing(service: RunningService, keys: int, runs: int) -> list[tuple[str, str, str, str]]:
    """The 99th percentile while the million rows are read again and again, against that of an idle service."""
    pairs = []
    for _ in range(runs):
        idle = benchmark(service.resp_port, keys, 1)
        stop = threading.Event()
        refreshing = threading.Thread(target=refresh_until, args=(service, stop))
        refreshing.start()
        pairs.append((benchmark(service.resp_port, keys, 1), idle))
        stop.set()
        refreshing.join()
    ratios = [busy.p99_ms / idle.p99_ms for busy, idle in pairs]
    busy_ms, idle_ms = [busy.p99_ms for busy, _ in pairs], [idle.p99_ms for _, idle in pairs]
    return [
        ("GET p99 ms while a refresh runs", spread(busy_ms), f"idle {spread(idle_ms)}", ""),
        ("ratio of each pair", spread(ratios), "", limit(median(ratios), MOST_P99_RATIO, "")),
    ]


def refresh_until(service: RunningService, stop: threading.Event) -> None:
    while not stop.is_set():
        service.start_refresh()
        service.wait_refreshed()


def whole_datasets(service: RunningService, redis_port: int, runs: int) -> list[tuple[str, str, str, str]]:
    """Megabytes per second of HGETALL and of the same dataset over HTTP, against Redis's HGETALL."""
    measured: dict[str, list[float]] = {"HGETALL": [], "HTTP": [], "Redis": []}
    for _ in range(runs):
        measured["HGETALL"].append(rate(lambda: hgetall_bytes(service.resp_port)))
        measured["Redis"].append(rate(lambda: hgetall_bytes(redis_port)))
        measured["HTTP"].append(rate(lambda: http_bytes(service.http_port)))
    rows = []
    for what in ("HGETALL", "HTTP"):
        ratios = [ours / theirs for ours, theirs in zip(measured[what], measured["Redis"], strict=True)]
        rows.append((f"{what} of {_HASH_ROWS:,} rows, MiB per second", *spreads(measured[what], measured["Redis"])))
        rows.append(("ratio of each pair", spread(ratios), "", floor(median(ratios), 1.0)))
    return rows


def rate(read: Callable[[], int], times: int = 10) -> float:
    """Megabytes per second of several reads, one after the other."""
    read()
    start = time.perf_counter()
    size_bytes = sum(read() for _ in range(times))
    return size_bytes / (time.perf_counter() - start) / 2**20


def hgetall_bytes(port: int) -> int:
    """How long the answer is; it ends where the one of the PING after it begins."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"*2\r\n$7\r\nHGETALL\r\n$8\r\nproducts\r\n*1\r\n$4\r\nPING\r\n")
        size_bytes = 0
        end = b""
        while not end.endswith(b"+PONG\r\n"):
            part = connection.recv(1 << 20)
            size_bytes += len(part)
            end = (end + part)[-7:]
        return size_bytes


def http_bytes(port: int) -> int:
    """How long the answer is, read as plainly as the other, so that no client's parser is measured."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /v1/datasets/products HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        size_bytes = 0
        while part := connection.recv(1 << 20):
            size_bytes += len(part)
        return size_bytes


@contextmanager
def redis_server() -> Iterator[int]:
    """A Redis of our own; its port."""
    with tempfile.TemporaryDirectory(prefix="cacheservice-benchmark-") as directory:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        process = subprocess.Popen(
            [redis_program(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory],
            stdout=subprocess.DEVNULL,
        )
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            yield port
        finally:
            process.terminate()
            process.wait()


@contextmanager
def redis_with_rows(server: EmbeddedPostgres, query: str) -> Iterator[int]:
    with redis_server() as port, closing(socket.create_connection(("127.0.0.1", port))) as client:
        for batch in batches(server, query):
            set_all(client, batch)
        yield port


@contextmanager
def redis_with_hash(server: EmbeddedPostgres, query: str) -> Iterator[int]:
    with redis_server() as port, closing(socket.create_connection(("127.0.0.1", port))) as client:
        for batch in batches(server, query):
            words = [b"HSET", b"products", *(word.encode() for row in batch for word in row)]
            request = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
            client.sendall(request)
            assert client.recv(64).startswith(b":")
        yield port


def batches(server: EmbeddedPostgres, query: str) -> Iterator[list[tuple[str, str]]]:
    """The same keys and documents that a refresh gets."""
    with closing(psycopg2.connect(server.dsn())) as connection, connection.cursor("rows") as cursor:
        cursor.execute(f"SELECT id::text, row_to_json(p)::text FROM ({query}) p")
        while batch := cursor.fetchmany(_BATCH_ROWS):
            yield batch


if __name__ == "__main__":
    main()
