"""Laws of who is let in, and of what the process's descriptors are for."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ports.admission import Door, Plan, Room, plan
from tests.kit.daemon import OPEN_FILES, PRODUCTS
from tests.kit.logs import Log
from tests.kit.metrics import place
from tests.kit.real_service import ProbesTestCase
from tests.kit.waiting import GIVE_UP_S, wait_until


class Guest:
    def __init__(self) -> None:
        self.turned_away = False

    def turn_away(self) -> None:
        self.turned_away = True


class Plans(SynchronousTestCase):
    @given(st.integers(40, 1 << 20), st.integers(1, 100), st.integers(1, 5))
    def test_it_adds_up(self, descriptors: int, sessions: int, ports: int) -> None:
        """There is always a place for a client and a probe; with descriptors for all of it, no more is given away."""
        made = plan(descriptors, sessions, ports)
        self.assertGreaterEqual(min(made.clients, made.reserve, made.accepted), 1)
        if descriptors >= 40 + sessions + 2 * ports:
            self.assertLessEqual(made.clients + made.reserve * ports + made.accepted + 28 + sessions, descriptors)

    def test_usual_limits(self) -> None:
        """Of 1,024 some 850 are for clients; of 40,000 nearly all."""
        self.assertEqual(plan(1024, 2, 3), Plan(1024, 843, 16, 100))
        self.assertEqual(plan(40_000, 2, 3).clients, 39_819)


class Doors(SynchronousTestCase):
    def door(self, clients: int, reserve: int, clock: Clock | None = None, log: Log | None = None) -> Door:
        room = Room(Plan(100, clients, reserve, 10))
        return Door("http", room, reserve, log, (clock or Clock()).seconds)

    def test_two_limits(self) -> None:
        """That of the port and that of the files of all ports; who leaves makes room."""
        room = Room(Plan(100, 3, 0, 10))
        first, second = (Door(name, room, 0, None, Clock().seconds) for name in ("resp", "http"))
        guests = [Guest() for _ in range(4)]
        self.assertTrue(first.admit(guests[0], 2) and first.admit(guests[1], 2))
        self.assertFalse(first.admit(guests[2], 2))
        self.assertTrue(second.admit(guests[2], 2))
        self.assertFalse(second.admit(guests[3], 2))
        first.left(guests[3], was_admitted=False)
        self.assertFalse(second.admit(guests[3], 2))
        first.left(guests[0], was_admitted=True)
        self.assertTrue(second.admit(guests[3], 2))

    def test_the_oldest_in_reserve_goes(self) -> None:
        """The newest has a place in reserve, whoever waits there."""
        door = self.door(1, 2)
        self.assertTrue(door.admit(Guest(), 1))
        guests = [Guest() for _ in range(4)]
        self.assertFalse(any(door.admit(guest, 1) for guest in guests))
        self.assertEqual([guest.turned_away for guest in guests], [True, True, False, False])
        door.left(guests[2], was_admitted=False)
        self.assertFalse(door.admit(Guest(), 1))
        self.assertFalse(guests[3].turned_away)

    def test_refusals_are_logged_once_a_minute(self) -> None:
        """With how many there were since the last line."""
        clock, log = Clock(), Log()
        door = self.door(1, 2, clock, log)
        for _ in range(5):
            door.note_refusal(1)
        clock.advance(61)
        door.note_refusal(1)
        self.assertEqual([line["count"] for _, line in log.events], [1, 5])


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
        """A connection for which there is no descriptor fails in words that say so, though libpq has none."""
        program = """
import os, resource, psycopg2
from cacheservice.postgres.target import parse
from cacheservice.postgres.translate import translate
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
