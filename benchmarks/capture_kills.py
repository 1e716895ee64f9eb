"""Faults of change capture by logical decoding, at random moments while random transactions commit.

The service is killed, its walsender is ended, or the network between them is cut. A second later nothing of the lost
session may be left at the server. When the service is back, its rows must become those of the query, and a full read
must find no difference that the capture had not announced.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack, closing
from random import Random
from statistics import median
from typing import Any

import psycopg2
from tabulate import tabulate

from benchmarks.deltas import RespClient
from benchmarks.products import own_server
from benchmarks.service import RunningService, running_service
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.sources.postgres.publishing import publish
from tests.kit.faulty_network import Network

FAULTS = ("kill", "terminate", "reset", "truncate")
SETTINGS = {"wal_level": "logical", "max_replication_slots": "4", "max_wal_senders": "4"}

_ROWS, _WRITERS = 5000, 3
_TABLE = f"""
CREATE TABLE products (id int PRIMARY KEY, name text, n int NOT NULL DEFAULT 0);
INSERT INTO products SELECT i, 'product ' || i, 0 FROM generate_series(1, {_ROWS}) AS i;
CREATE TABLE prices (product_id int, currency text, amount int NOT NULL, PRIMARY KEY (product_id, currency));
INSERT INTO prices SELECT id, 'EUR', id FROM products;
"""
_QUERY = (
    "SELECT p.id, p.name, p.n, sum(r.amount) AS amount FROM products AS p "
    "LEFT JOIN prices AS r ON r.product_id = p.id GROUP BY p.id"
)
_DATASET = {
    "query": _QUERY,
    "watch": [{"table": "public.products", "key": "id"}, {"table": "public.prices", "key": "product_id"}],
    # Nothing but the capture, or its loss, leads to a read.
    "interval_s": 1_000_000,
    "full_interval_s": 1_000_000,
    "timeout_s": 10,
    "max_delta": 0.5,
    "retry_initial_s": 0.1,
    "retry_max_s": 0.5,
}
_LEFT_AFTER_S = 1.0
_BACK_WITHIN_S, _EQUAL_WITHIN_S = 30.0, 20.0
_POLL_S = 0.02


class Writers:
    """Threads that commit random transactions, until `end`; none is open while they are held."""

    def __init__(self, dsn: str, random: Random) -> None:
        self.committed = 0
        self._dsn = dsn
        self._may_write = threading.Event()
        self._ended = False
        self._locks = [threading.Lock() for _ in range(_WRITERS)]
        self._threads = [
            threading.Thread(target=self._write, args=(Random(random.random()), lock)) for lock in self._locks
        ]
        self._may_write.set()
        for thread in self._threads:
            thread.start()

    def hold(self) -> None:
        """Return when none of them is within a transaction."""
        self._may_write.clear()
        for lock in self._locks:
            with lock:
                pass

    def go_on(self) -> None:
        self._may_write.set()

    def end(self) -> None:
        self._ended = True
        self._may_write.set()
        for thread in self._threads:
            thread.join()

    def _write(self, random: Random, lock: threading.Lock) -> None:
        with closing(psycopg2.connect(self._dsn)) as connection, connection.cursor() as cursor:
            while not self._ended:
                self._may_write.wait()
                with lock:
                    if not self._may_write.is_set():
                        continue
                    try:
                        for _ in range(random.choice([1, 1, 1, 3, 10])):
                            change(cursor, random)
                            if random.random() < 0.1:
                                time.sleep(random.random() * 0.03)
                        (connection.commit if random.random() < 0.9 else connection.rollback)()
                        self.committed += 1
                    except (psycopg2.errors.UniqueViolation, psycopg2.errors.DeadlockDetected):
                        connection.rollback()
                time.sleep(random.random() * 0.01)


def change(cursor: Any, random: Random) -> None:
    """One random statement."""
    one, other, n = random.randint(1, _ROWS), random.randint(1, _ROWS), random.randrange(10**6)
    match random.randrange(8):
        case 0:
            cursor.execute("UPDATE products SET n = %s WHERE id = %s", (n, one))
        case 1:
            cursor.execute("UPDATE products SET n = %s WHERE id BETWEEN %s AND %s", (n, one, one + 50))
        case 2:
            cursor.execute("UPDATE products SET id = %s WHERE id = %s", (other, one))
        case 3:
            cursor.execute("DELETE FROM products WHERE id = %s", (one,))
        case 4 | 5:
            cursor.execute(
                "INSERT INTO products VALUES (%s, 'new', %s) ON CONFLICT (id) DO UPDATE SET n = -1", (one, n)
            )
        case 6:
            cursor.execute("UPDATE prices SET amount = %s WHERE product_id = %s", (n, one))
        case 7:
            cursor.execute("SAVEPOINT s")
            cursor.execute("UPDATE products SET n = %s WHERE id = %s", (n, one))
            cursor.execute("ROLLBACK TO s" if random.random() < 0.5 else "RELEASE s")


class Kills:
    """The rounds of faults; `problems` are broken laws."""

    def __init__(self, server: EmbeddedPostgres, network: Network, random: Random) -> None:
        self.problems: list[str] = []
        self.faults: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.back_s: list[float] = []
        self.equal_s: list[float] = []
        self._server, self._network, self._random = server, network, random
        self._life = ExitStack()
        self.service = self._start()

    def close(self) -> None:
        self._life.close()

    def one(self, number: int, writers: Writers) -> None:
        """Strike at a random moment, and look at the server and at the rows."""
        time.sleep(self._random.uniform(0.0, 1.5))
        fault = self._random.choice(FAULTS)
        self.faults[fault] += 1
        self._note_reads()
        lost = slots(self._server)
        struck_at = time.monotonic()
        self._strike(fault)
        time.sleep(_LEFT_AFTER_S)
        if left := [name for name in slots(self._server) if name in lost]:
            self.problems.append(f"round {number}, {fault}: the slots {left} are left with {retained(self._server)}")
        folders = self._server.run_sql("SELECT pg_ls_dir('pg_replslot')").split()
        if left := [name for name in folders if name in lost]:
            self.problems.append(f"round {number}, {fault}: the folders {left} are left")
        if fault == "kill":
            self._life.close()
            self.service = self._start()
        else:
            if fault != "terminate":
                self._network.order("heal")
            self._wait_back(number, fault, lost)
        self.back_s.append(time.monotonic() - struck_at)
        time.sleep(self._random.uniform(0.0, 0.5))
        writers.hold()
        self.check_rows(f"round {number}, {fault}")
        writers.go_on()

    def check_rows(self, when: str) -> None:
        """Wait until the rows are those of the query."""
        began_at = time.monotonic()
        expected = queried(self._server)
        while (found := served(self.service)) != expected:
            if time.monotonic() > began_at + _EQUAL_WITHIN_S:
                keys = [key for key in {*found, *expected} if found.get(key) != expected.get(key)]
                self.problems.append(f"{when}: {len(keys)} rows differ from those of the query, such as {keys[:5]}")
                self.service.start_refresh()
                self.service.wait_refreshed()
                return
            time.sleep(_POLL_S)
        self.equal_s.append(time.monotonic() - began_at)

    def check_all(self, when: str) -> None:
        """Read everything as a check of the deltas."""
        self.service.start_refresh()
        self.service.wait_refreshed()
        if count := differences(self.service):
            self.problems.append(f"{when}: a full read has found {count:.0f} differences")

    def _start(self) -> RunningService:
        # Through the network, which counts nothing but may be cut.
        dsn = self._server.dsn(port=self._network.port)
        service = self._life.enter_context(
            running_service(dsn, _QUERY, dataset=_DATASET, CACHESERVICE_POSTGRES__CAPTURE="logical")
        )
        service.wait_event("capture_began")
        return service

    def _strike(self, fault: str) -> None:
        if fault == "kill":
            if count := differences(self.service):
                self.problems.append(f"before a kill: a full read has found {count:.0f} differences")
            os.kill(self.service.pid, signal.SIGKILL)
        elif fault == "terminate":
            self._server.run_sql(
                "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active_pid IS NOT NULL"
            )
        else:
            self._network.order(fault)

    def _wait_back(self, number: int, fault: str, lost: list[str]) -> None:
        limit_at = time.monotonic() + _BACK_WITHIN_S
        while not [name for name in slots(self._server) if name not in lost]:
            if time.monotonic() > limit_at:
                self.problems.append(f"round {number}, {fault}: no stream again within {_BACK_WITHIN_S:.0f} s")
                return
            time.sleep(_POLL_S)

    def _note_reads(self) -> None:
        for event in self.service.events():
            if event["event"] in ("refresh_published", "refresh_unchanged"):
                self.reads["deltas" if event["read"].startswith("a delta") else "other reads"] += 1
            if event["event"] in ("internal_error", "delta_differences"):
                self.problems.append(json.dumps(event))


def slots(server: EmbeddedPostgres) -> list[str]:
    return server.run_sql(r"SELECT slot_name FROM pg_replication_slots WHERE slot_name LIKE 'cacheservice\_%'").split()


def retained(server: EmbeddedPostgres) -> str:
    sql = "SELECT slot_name, pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) FROM pg_replication_slots"
    return server.run_sql(sql).strip()


def queried(server: EmbeddedPostgres) -> dict[str, Any]:
    rows = server.run_sql(f"SELECT to_json(q) FROM ({_QUERY}) AS q").splitlines()
    return {str(row["id"]): row for row in map(json.loads, rows)}


def served(service: RunningService) -> dict[str, Any]:
    """All rows, over RESP."""
    with closing(RespClient(service.resp_port)) as client:
        found = client.ask("HGETALL", "products")
    return {key.decode(): json.loads(row) for key, row in zip(found[::2], found[1::2], strict=True)}


def differences(service: RunningService) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{service.http_port}/metrics") as answer:
        text = answer.read().decode()
    found = re.search(r"^cacheservice_delta_differences_total\{[^}]*\} (\S+)", text, re.MULTILINE)
    return float(found[1]) if found is not None else 0.0


def run(rounds: int, seed: int) -> int:
    """Return 0 if no law was broken."""
    random = Random(seed)
    with own_server(SETTINGS) as server, ExitStack() as stack:
        server.run_sql(_TABLE)
        publish(server.dsn(), "public.products", ["id"], "cacheservice", False, print)
        publish(server.dsn(), "public.prices", ["product_id"], "cacheservice", False, print)
        network = Network(server.port)
        stack.callback(network.close)
        kills = Kills(server, network, random)
        stack.callback(kills.close)
        writers = Writers(server.dsn(), random)
        stack.callback(writers.end)
        for number in range(1, rounds + 1):
            kills.one(number, writers)
            if number % 10 == 0 or number == rounds:
                writers.hold()
                kills.check_all(f"round {number}")
                kills.check_rows(f"round {number}, after the full read")
                print(f"round {number}: {len(kills.problems)} problems, {writers.committed:,} transactions", flush=True)
                writers.go_on()
        kills._note_reads()
    rows = [
        *(("faults", name, count) for name, count in sorted(kills.faults.items())),
        ("transactions", "", writers.committed),
        *(("reads", name, count) for name, count in sorted(kills.reads.items())),
        ("streaming again after, s", "median, most", f"{median(kills.back_s):.2f}, {max(kills.back_s):.2f}"),
        ("rows equal after, s", "median, most", f"{median(kills.equal_s):.2f}, {max(kills.equal_s):.2f}"),
        ("broken laws", "", len(kills.problems)),
    ]
    print(tabulate(rows, headers=["", "", "count"], disable_numparse=True))
    for problem in kills.problems:
        print(problem)
    return 1 if kills.problems else 0
