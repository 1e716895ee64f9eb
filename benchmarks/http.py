"""Requests a second of the HTTP port against twisted.web's own Site with one constant page of the same size.

The peer is as quick as twisted.web gets: a leaf Resource that sets what it must, and no access log. Each pair of runs
of wrk is one after the other, 50 connections that stay, and the median is of the pairs' ratios. Then the whole dataset,
and how long other clients wait while several read it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from twisted.internet import reactor
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from benchmarks.figures import floor, limit, mib, print_figures, spread
from benchmarks.products import server_with_products
from benchmarks.service import ROOT, running_service

CONNECTIONS = 50
LEAST_RATIO = 1.0
MOST_P99_MS = 20.0

_KEY = 4242
_START_LIMIT_S = 30
_STREAMS = 4
_PIECE_BYTES = 256 * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seconds", type=int, default=4, help="of each run of wrk")
    parser.add_argument("--peer", nargs=2, metavar=("PORT", "PAGE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        serve_peer(int(options.peer[0]), options.peer[1].encode())
        return
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is needed: apt-get install wrk")
    http_port, peer_port = free_port(), free_port()
    with (
        server_with_products(options.rows) as server,
        running_service(server.dsn(), CACHESERVICE_HTTP__PORT=str(http_port)),
    ):
        row = f"/v1/datasets/products/rows/{_KEY}"
        head, document = get(http_port, row)
        tag = re.search(r"ETag: (\S+)", head)
        assert tag is not None
        with peer(peer_port, document.decode()):
            rows = compared(http_port, row, peer_port, "/", (), options)
            condition = ("-H", f"If-None-Match: {tag[1]}")
            unchanged = compared(http_port, "/v1/datasets/products", peer_port, "/", condition, options, '"x"')
        figures = [*shown("rows/KEY, requests/s", rows), *shown("304 of the whole, requests/s", unchanged)]
        print_figures([*figures, *whole_figures(http_port)])


def compared(
    port: int,
    path: str,
    peer_port: int,
    peer_path: str,
    condition: tuple[str, ...],
    options: argparse.Namespace,
    peer_tag: str = "",
) -> list[tuple[float, float]]:
    """Requests a second of ours and the peer's, pair by pair; which goes first changes."""
    pairs = []
    peer_condition = ("-H", f"If-None-Match: {peer_tag}") if peer_tag else ()
    for number in range(options.pairs):
        sides = [(port, path, condition), (peer_port, peer_path, peer_condition)]
        order = sides if number % 2 == 0 else sides[::-1]
        rates = [wrk(*side, options.seconds) for side in order]
        pairs.append((rates[0], rates[1]) if number % 2 == 0 else (rates[1], rates[0]))
    return pairs


def shown(what: str, pairs: list[tuple[float, float]]) -> list[tuple[str, str, str, str]]:
    ratios = [ours / theirs for ours, theirs in pairs]
    rate = "{:,.0f}".format
    peers = f"twisted.web {spread([theirs for _, theirs in pairs], rate)}"
    return [
        (what, spread([ours for ours, _ in pairs], rate), peers, ""),
        ("ratio of each pair", spread(ratios), "", floor(median(ratios), LEAST_RATIO)),
    ]


def wrk(port: int, path: str, more: tuple[str, ...], seconds: int) -> float:
    """:raises RuntimeError: if a request failed; a 304 is not a failure."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", *more, f"http://127.0.0.1:{port}{path}"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rate = re.search(r"Requests/sec: +([0-9.]+)", output)
    if rate is None or "Non-2xx" in output or "Socket errors" in output:
        raise RuntimeError(output)
    return float(rate[1])


def whole_figures(port: int) -> Iterator[tuple[str, str, str, str]]:
    """Time and size of the whole dataset, plain and compressed, first and again; others' waits meanwhile."""
    for what, coding in (("plain", ""), ("gzip, first", "gzip"), ("gzip, again", "gzip")):
        began_at = time.monotonic()
        size_bytes = drain(port, coding)
        yield f"whole dataset, {what}", f"{time.monotonic() - began_at:.2f} s", mib(size_bytes), ""
    for streams in (0, 1, _STREAMS):
        waits_ms = sorted(waits_while(port, streams))
        p50, p99 = waits_ms[len(waits_ms) // 2], waits_ms[len(waits_ms) * 99 // 100]
        target = limit(p99, MOST_P99_MS, " ms") if streams else ""
        yield f"GET of a row while {streams} read it all, p99", f"{p99:.1f} ms", f"p50 {p50:.1f} ms", target


def waits_while(port: int, streams: int) -> list[float]:
    """Milliseconds that each of a number of row reads took while `streams` clients read everything."""
    reader = "import sys; from benchmarks.http import drain\nwhile True: drain(int(sys.argv[1]), '')"
    readers = [subprocess.Popen([sys.executable, "-c", reader, str(port)], cwd=ROOT) for _ in range(streams)]
    try:
        time.sleep(1)
        with socket.create_connection(("127.0.0.1", port)) as client:
            request = f"GET /v1/datasets/products/rows/{_KEY} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
            waits = []
            for _ in range(1000):
                began_at = time.monotonic()
                client.sendall(request)
                client.recv(65_536)
                waits.append((time.monotonic() - began_at) * 1000)
                time.sleep(0.002)
            return waits
    finally:
        for process in readers:
            process.kill()
            process.wait()


def drain(port: int, coding: str) -> int:
    """Read the whole dataset; the bytes of the answer."""
    head = f"GET /v1/datasets/products HTTP/1.0\r\nAccept-Encoding: {coding}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode())
        size_bytes = 0
        while part := client.recv(_PIECE_BYTES):
            size_bytes += len(part)
        return size_bytes


def get(port: int, path: str) -> tuple[str, bytes]:
    """Head and body."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        text = b""
        while part := client.recv(65_536):
            text += part
    head, _, body = text.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise RuntimeError(head.decode())
    return head.decode(), body


@contextmanager
def peer(port: int, page: str) -> Iterator[None]:
    """twisted.web's Site in a process of its own."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.http", "--peer", str(port), page], cwd=ROOT)
    try:
        ends_at = time.monotonic() + _START_LIMIT_S
        while True:
            try:
                get(port, "/")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > ends_at:
                    raise
                time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def serve_peer(port: int, page: bytes) -> None:
    class Page(Resource):
        isLeaf = True

        def render_GET(self, request: Request) -> bytes:
            request.setHeader(b"Content-Type", b"application/json")
            return b"" if request.setETag(b'"x"') else page

    class Quiet(Site):
        def log(self, request: object) -> None:
            pass

    reactor.listenTCP(port, Quiet(Page()), backlog=511, interface="127.0.0.1")  # type: ignore[attr-defined]
    reactor.run()  # type: ignore[attr-defined]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
