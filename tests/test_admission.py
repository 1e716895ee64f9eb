"""Laws of admission, and of the use of the process's descriptors."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack

from tests.kit.daemon import OPEN_FILES, PRODUCTS
from tests.kit.metrics import place
from tests.kit.real_service import ProbesTestCase
from tests.kit.waiting import GIVE_UP_S, wait_until


class FewDescriptors(ProbesTestCase):
    """The service with few descriptors, and more clients than those allow."""

    def test_refreshes_go_on(self) -> None:
        """With 100 descriptors and 300 idle clients refreshes and probes work; log and status name the limit."""
        daemon = self.started(self.configuration(PRODUCTS), before=OPEN_FILES)
        self.wait_ready(daemon)
        capped = daemon.event("connections_capped")
        self.assertEqual((capped["configured"], capped["open_files"]), (10_000, 100))
        self.assertIn(
            f"clients capped at {capped['limit']} of 10,000 by the limit of 100 open files", daemon.ask("status")
        )
        with ExitStack() as there:
            for port in (self.port_of(daemon, "resp"), self.port_of(daemon, "http"), self.port_of(daemon, "status")):
                for _ in range(100):
                    there.enter_context(socket.create_connection(("127.0.0.1", port), timeout=GIVE_UP_S))
            moments: set[str] = set()

            def is_refreshed() -> bool:
                moments.add(daemon.json()["datasets"]["products"]["as_of"])
                return len(moments) > 3

            wait_until(is_refreshed, "refreshes")
            self.assertEqual(daemon.json()["datasets"]["products"]["consecutive_failures"], 0)
            self.wait_ready(daemon)
            now = self.now(daemon)
            self.assertEqual(now[place("cacheservice_connections_limit", port="http")], capped["limit"])
            self.assertGreater(now[place("cacheservice_rejected_total", port="resp", reason="too_many_connections")], 0)
            self.assertEqual(daemon.event("clients_turned_away")["open_files"], 100)

    def test_none_left(self) -> None:
        """A connection without a descriptor fails with an error that names the cause, though libpq has none."""
        program = """
import os, resource, psycopg2
from cacheservice.sources.postgres.target import parse
from cacheservice.sources.postgres.translate import translate
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True: os.dup(0)
except OSError: pass
for user in ("", " user=x"):
    try: psycopg2.connect("dbname=x host=localhost hostaddr=127.0.0.1 port=1" + user, async_=1)
    except psycopg2.Error as error: ours = translate(error, parse("host=localhost"), connecting=True)
    print(ours, "|", ours.advice)
"""
        told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for line in told.splitlines():
            self.assertIn("no connection could be opened: all 64 open files of the process are used | raise", line)
