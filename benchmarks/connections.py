"""What 10,000 idle clients of the status port cost the service, and what the one after them receives."""

from __future__ import annotations

import argparse
import resource
import socket
import time
from statistics import median

from benchmarks.figures import limit, print_figures, spread
from benchmarks.products import server_with_products
from benchmarks.service import memory_bytes, running_service
from cacheservice.cli.embedded import EmbeddedPostgres

MOST_BYTES = 5000

_SPARE_DESCRIPTORS = 100
_SETTLE_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    allow_descriptors(options.connections + _SPARE_DESCRIPTORS)
    with server_with_products(10) as server:
        silent = [growth(server, options.connections, b"") for _ in range(options.runs)]
        spoken = [growth(server, options.connections, b"prompt\nruok\n") for _ in range(options.runs)]
    (refusal,) = {refusal for _, _, refusal in silent + spoken}
    print(f"client {options.connections + 1:,} reads: {refusal}\n")
    print_figures([figure("never said a word", silent), figure("said `prompt` and `ruok`", spoken)])


def figure(who: str, measured: list[tuple[float, float, str]]) -> tuple[str, str, str, str]:
    each = [each_bytes for each_bytes, _, _ in measured]
    return f"bytes of a client that {who}", spread(each, "{:,.0f}".format), "", limit(median(each), MOST_BYTES, "")


def growth(server: EmbeddedPostgres, connections: int, first_words: bytes) -> tuple[float, float, str]:
    """Bytes of RSS that each connection added, seconds until all were accepted, what the one after them reads.

    The first fifth does not count: it lies in memory that was in use and free again since the start.
    """
    with running_service(server.dsn(), max_connections=connections) as service:
        address = ("127.0.0.1", service.port)
        clients: list[socket.socket] = []

        def connect(count: int) -> int:
            for _ in range(count):
                client = socket.create_connection(address)
                client.sendall(first_words)
                clients.append(client)
            # Accepted in order: when the next one has its reply, all of these are in.
            service.ask("ruok")
            time.sleep(_SETTLE_S)
            return memory_bytes(service.pid)

        few = connections // 5
        fewer_bytes = connect(few)
        began_at = time.monotonic()
        more_bytes = connect(connections - few)
        took_s = time.monotonic() - began_at - _SETTLE_S
        with socket.create_connection(address) as one_too_many, one_too_many.makefile() as lines:
            refusal = lines.readline().rstrip("\n")
        clients[0].sendall(b"ruok\n")
        assert clients[0].recv(100).endswith(b"imok\n\n" if first_words else b"imok\n"), "it is still served"
        for client in clients:
            client.close()
    return (more_bytes - fewer_bytes) / (connections - few), took_s, refusal


def allow_descriptors(count: int) -> None:
    """The service raises its own limit as far as the hard one allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise SystemExit(f"the hard limit of open files is {hard}, {count} are needed: ulimit -Hn {count}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
