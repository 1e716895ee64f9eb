"""The law of CACHE.WAIT, on the whole service: after it answers 1, a writer reads what it wrote."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import redis
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.paths import ROOT
from tests.kit.postgres import connect, fresh_database, query

ROUNDS = 10_000
WRITERS = 16
ROWS = 500
LIMIT_MS = 60_000


@pytest.mark.usefixtures("server")
class ReadYourWrites(SynchronousTestCase):
    server: EmbeddedPostgres

    def setUp(self) -> None:
        self.database = fresh_database(self.server, self.addCleanup)
        query(self.server, self.database, "CREATE TABLE counters AS SELECT generate_series(1, 500) AS id, 0 AS value")
        query(self.server, self.database, "ALTER TABLE counters ADD PRIMARY KEY (id)")
        query(self.server, self.database, "CREATE TABLE noise (id bigint GENERATED ALWAYS AS IDENTITY)")
        folder = Path(tempfile.mkdtemp(prefix="cacheservice-writes-"))
        self.addCleanup(shutil.rmtree, folder)
        (folder / "cacheservice.toml").write_text(
            f'[postgres]\ndsn = "{self.server.dsn(database=self.database)}"\n'
            "[status]\nport = 0\n[resp]\nport = 0\n[http]\nport = 0\n"
            '[datasets.counters]\nquery = "SELECT id, value FROM counters"\nkey = "id"\ninterval_s = 600\n'
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CACHESERVICE_")}
        log = folder / "log"
        with log.open("wb") as output:
            service = subprocess.Popen(
                [sys.executable, "-m", "cacheservice", "run"],
                cwd=folder,
                env=environment | {"PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.addCleanup(service.wait)
        self.addCleanup(service.terminate)
        while "refresh_published" not in log.read_text():
            self.assertIsNone(service.poll(), log.read_text())
            time.sleep(0.05)
        started = next(
            line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "service_started"
        )
        self.port = int(started["resp"].rpartition(":")[2])

    def write_and_read(self, number: int, rounds: int, failures: list[str], stop: threading.Event) -> None:
        pick = random.Random(number)
        mine = [row for row in range(1, ROWS + 1) if row % WRITERS == number]
        with closing(connect(self.server, self.database)) as connection, redis.Redis(port=self.port) as cache:
            connection.autocommit = False
            for value in range(1, rounds + 1):
                row = pick.choice(mine)
                with connection.cursor() as cursor:
                    if pick.random() < 0.1:  # one that is rolled back takes a number as well
                        cursor.execute("UPDATE counters SET value = -1 WHERE id = %s", (row,))
                        connection.rollback()
                    cursor.execute("UPDATE counters SET value = %s WHERE id = %s", (value, row))
                    cursor.execute("SELECT pg_current_xact_id()::text")
                    (transaction_id,) = cursor.fetchone()
                connection.commit()
                if stop.is_set():
                    return
                answer = cache.execute_command("CACHE.WAIT", "counters", transaction_id, LIMIT_MS)
                read = json.loads(cache.hget("counters", row))["value"]
                if answer != 1 or read != value:
                    failures.append(
                        f"writer {number}: waited for {transaction_id}: {answer}, wrote {value}, read {read}"
                    )
                    stop.set()

    def hold_transactions(self, stop: threading.Event) -> None:
        """Keep transactions open for longer than others take from beginning to end."""
        pick = random.Random(0)
        with closing(connect(self.server, self.database)) as one, closing(connect(self.server, self.database)) as two:
            for connection in (one, two):
                connection.autocommit = False
            while not stop.is_set():
                for connection in (one, two):
                    with connection.cursor() as cursor:
                        cursor.execute("INSERT INTO noise DEFAULT VALUES")
                    stop.wait(pick.random() * 0.3)
                one.commit()
                two.rollback()

    def test_a_writer_reads_its_own_writes(self) -> None:
        """10,000 times out of 10,000, by 16 writers at once, with long transactions open beside them."""
        failures: list[str] = []
        stop = threading.Event()
        holder = threading.Thread(target=self.hold_transactions, args=(stop,))
        writers = [
            threading.Thread(target=self.write_and_read, args=(number, ROUNDS // WRITERS, failures, stop))
            for number in range(WRITERS)
        ]
        for thread in (holder, *writers):
            thread.start()
        for writer in writers:
            writer.join()
        stop.set()
        holder.join()
        self.assertEqual(failures, [])
        with redis.Redis(port=self.port, protocol=3) as cache:
            # All that waited at the same time shared a refresh.
            self.assertLess(cache.execute_command("CACHE.INFO", "counters")[b"generation"], ROUNDS)
            # A transaction that has not ended is not waited for beyond the limit.
            future = 2**40
            self.assertEqual(cache.execute_command("CACHE.WAIT", "counters", future, 50), 0)
