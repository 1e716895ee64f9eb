"""Laws of the listening session, on a real server and through the faulty network: a notification is heard, or it is
reported that some may have been missed; whatever cannot hear is found out, and nothing of it is left behind."""

from __future__ import annotations

import gc
import itertools
import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import closing, contextmanager
from itertools import pairwise
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import CancelledError
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from cacheservice.base.errors import DatabaseUnavailable, DeadlineExceeded
from cacheservice.config import OWN_CHANNEL
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.listening.calls import Observer
from cacheservice.sources.postgres.listening.listener import Listener
from cacheservice.sources.postgres.listening.opening import Access
from cacheservice.sources.postgres.listening.pace import Pace
from cacheservice.sources.postgres.target import parse
from tests.kit import pgbouncer
from tests.kit.datasets import rows_builder
from tests.kit.guard import LONG_S, LONGEST_GAP_S, GuardTestCase, as_awaitable, held, our_timers, settings
from tests.kit.listening import Diary
from tests.kit.pgbouncer import running_pgbouncer
from tests.kit.postgres import connect, query, sessions, sessions_left
from tests.kit.readings import read_one
from tests.kit.standby import running_standby
from tests.kit.waiting import until

# What is to be found out soon; an answer that takes longer on a busy machine costs a needless reconnect.
QUICK = {
    "canary_interval_s": 0.2,
    "answer_within_s": 1.0,
    "retry_initial_s": 0.02,
    "retry_max_s": 0.1,
    "retry_slowly_s": 0.1,
}
# Only what the test does itself ends a session.
PATIENT = {**QUICK, "canary_interval_s": 2 * LONG_S, "answer_within_s": LONG_S}

LISTENS = "cacheservice listens"


class ListenerTestCase(GuardTestCase):
    async def setUp(self) -> None:
        await super().setUp()
        self.diary = Diary()
        self.writer = connect(self.server, self.database_name)
        self.addCleanup(self.close_writer)

    def close_writer(self) -> None:
        self.writer.close()

    def make_listener(
        self,
        *channels: str,
        dsn: str | None = None,
        connect_timeout_s: float = LONG_S,
        heard: Callable[[str, str], object] | None = None,
        missed: Callable[[], object] | None = None,
        **times: float,
    ) -> Listener:
        """Through the faulty network unless another `dsn` is given; stopped at the end of the test at the latest."""
        target = parse(dsn or self.server.dsn(database=self.database_name, port=self.network.port))
        access = Access(target, self.direct.connector, connect_timeout_s)
        self.observer = Observer(heard or self.diary.heard, missed or self.diary.missed)
        pace = Pace(**{**PATIENT, **times})
        listener = Listener(access, self.observer, self.status, reactor, self.diary.log, pace)
        listener.listen_to(channels)
        self.addCleanup(self.check_log)
        self.addCleanup(lambda: listener.stopService() if listener.running else None)
        return listener

    async def listening(self, *channels: str, **options: Any) -> Listener:
        listener = self.make_listener(*channels, **options)
        listener.startService()
        await self.until_proven()
        return listener

    def check_log(self) -> None:
        """No bug of the service, and no secret."""
        self.assertNotIn(self.password, str(self.diary.log.events) + str(self.status.listening_problem))
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def count(self, event: str) -> int:
        return sum(entry[0] == event for entry in self.diary)

    async def until_proven(self, times: int = 1) -> None:
        """Until so many sessions were, in all, and the last one is alive as far as we know."""
        await until(lambda: self.count("missed") >= times and self.status.listening)

    def notify(self, channel: str, payload: str) -> None:
        with self.writer.cursor() as cursor:
            cursor.execute("SELECT pg_notify(%s, %s)", (channel, payload))

    def pids(self) -> list[int]:
        """The server processes of our listening sessions."""
        return [s.pid for s in sessions(self.server, self.database_name) if s.application_name == LISTENS]

    async def check_stops(self, listener: Listener, before: dict[str, Any]) -> None:
        """A stop leaves nothing: not in the reactor, at once; not in the process, nor on the server, soon."""
        await listener.stopService()
        self.assertEqual(our_timers(), [])
        self.assertEqual((self.status.connections, self.status.listening), (0, False))
        self.network.heal()
        await self.check_left(before)

    async def check_left(self, before: dict[str, Any]) -> None:
        gc.collect()
        limit = reactor.seconds() + 30  # the proxy's own ends need a moment
        while held() != before and reactor.seconds() < limit:
            await deferLater(reactor, 0.02)
        self.assertEqual(held(), before)
        self.assertEqual(await sessions_left(self.server, self.database_name), [])
        self.assertLess(self.ticker.longest_gap_s, LONGEST_GAP_S)

    async def what_is_held(self) -> dict[str, Any]:
        await self.read()  # whatever is made once is made by now
        await until(lambda: not self.network.ends)
        gc.collect()
        return held()


class HearingTests(ListenerTestCase):
    """Nothing is wrong."""

    async def test_a_notification_is_heard(self) -> None:
        """With its channel and payload, once, and only of the channels that were named."""
        await self.listening("changes", "others")
        self.notify("elsewhere", "0")
        self.notify("changes", "1")
        self.notify("others", "")
        await until(lambda: len(self.diary.payloads) == 2)
        self.assertEqual(
            list(self.diary),
            [("listening_began",), ("missed",), ("heard", "changes", "1"), ("heard", "others", "")],
        )
        self.assertEqual(self.diary.log.events, [("listening_began", {"channels": 2})])

    async def test_payloads_are_intact(self) -> None:
        """All of Unicode, and as much as PostgreSQL takes: 7999 bytes."""
        await self.listening("changes")
        payloads = ["é" * 3999 + "x", "x" * 7999, "𝒳 ☃\n\t\"'\\", "{}"]
        for payload in payloads:
            self.notify("changes", payload)
        await until(lambda: len(self.diary.payloads) == len(payloads))
        self.assertEqual(self.diary.payloads, payloads)

    async def test_channels_of_any_name(self) -> None:
        """As PostgreSQL compares them: to the letter, quotes, blanks and 63 bytes included."""
        names = ['quoted "name"', "UPPER", "upper", "sp ace; LISTEN no", "select", "ä" * 31 + "x", "x" * 63, "it's"]
        await self.listening(*names)
        for name in names:
            self.notify(name, name)
        self.notify("Upper", "no")
        await until(lambda: len(self.diary.payloads) == len(names))
        self.assertEqual([entry[1:] for entry in self.diary if entry[0] == "heard"], [(n, n) for n in names])

    async def test_ten_thousand_in_one_transaction(self) -> None:
        """All are heard, in their order, and not more than some 1000 in one turn of the reactor."""
        turns: list[int] = []
        heard_at: list[int] = []

        def turn() -> None:
            turns.append(0)
            if len(heard_at) < 10_000:
                reactor.callLater(0, turn)

        def heard(_: str, payload: str) -> None:
            heard_at.append(len(turns))
            self.diary.heard(_, payload)

        await self.listening("numbers", heard=heard)
        with self.writer.cursor() as cursor:
            cursor.execute("SELECT pg_notify('numbers', i::text) FROM generate_series(1, 10000) i")
        turn()
        await until(lambda: len(heard_at) == 10_000)
        self.assertEqual(self.diary.payloads, [str(number) for number in range(1, 10_001)])
        # Our turns and the listener's are not in step, so that two batches may be between two of ours.
        self.assertLessEqual(max(heard_at.count(number) for number in set(heard_at)), 2000)

    async def test_what_is_notified_while_it_is_proven(self) -> None:
        """Canaries all the time: each notification is heard nevertheless, once and in its order."""
        await self.listening("numbers", canary_interval_s=0.0)
        for number in range(300):
            self.notify("numbers", str(number))
            await deferLater(reactor, 0)
        await until(lambda: len(self.diary.payloads) == 300)
        self.assertEqual(self.diary.payloads, [str(number) for number in range(300)])

    async def test_the_own_channel(self) -> None:
        """A notification that is not a canary is heard there too; canaries never are, even those of another service."""
        others: list[tuple[str, str]] = []
        listener = await self.listening(OWN_CHANNEL, canary_interval_s=0.02)
        await self.listening("changes", canary_interval_s=0.02, heard=lambda *what: others.append(what))
        sent = listener.canaries.sent
        await until(lambda: listener.canaries.sent > sent + 5)
        self.notify(OWN_CHANNEL, "canary of nobody")
        self.notify(OWN_CHANNEL, "something else")
        await until(lambda: others and self.diary.payloads)
        self.assertEqual(self.diary.payloads, ["something else"])
        self.assertEqual(others, [(OWN_CHANNEL, "something else")])
        self.assertEqual(self.count("listening_lost"), 0)

    async def test_a_callback_that_raises(self) -> None:
        """It is logged, and the others are heard."""

        def raise_(*_: str) -> None:
            self.diary.append(("called",))
            raise RuntimeError("a mistake")

        await self.make_and_raise(raise_)
        self.assertEqual(self.count("called"), 2)  # missed, then heard
        self.assertEqual(self.count("internal_error"), 2)
        self.assertEqual(self.count("listening_lost"), 0)

    async def make_and_raise(self, raise_: Callable[..., None]) -> None:
        listener = self.make_listener("changes", heard=raise_, missed=raise_)
        listener.startService()
        await until(lambda: self.status.listening)
        self.notify("changes", "1")
        await until(lambda: self.count("called") == 2)
        self.assertTrue(self.status.listening)

    async def test_it_proves_itself_again_and_again(self) -> None:
        """The moment of the last proof goes on, in one session and without a line for each."""
        await self.listening("changes", canary_interval_s=0.02)
        (pid,) = self.pids()
        for _ in range(5):
            proven_at = self.status.listening_proven_at
            await until(lambda proven_at=proven_at: self.status.listening_proven_at > proven_at)
        self.assertEqual(self.pids(), [pid])
        self.assertEqual([entry[0] for entry in self.diary], ["listening_began", "missed"])
        self.assertEqual(self.status.connections, 1)
        self.assertEqual((self.status.listening_wanted, self.status.listening_problem), (True, None))

    async def test_the_kernel_watches_the_path(self) -> None:
        """Keepalives while nothing is sent, a limit while something is; the connection string goes before ours."""
        options = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15_000}
        dsn = self.server.dsn(database=self.database_name)
        for more, wanted in ("", options), ("?keepalives_idle=77", options | {"TCP_KEEPIDLE": 77}):
            listener = await self.listening("changes", dsn=dsn + more)
            with socket.socket(fileno=os.dup(listener._session.guard._connection.fileno())) as end:
                self.assertEqual(
                    {name: end.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in options}, wanted
                )
            await listener.stopService()

    async def test_a_role_that_may_only_read(self) -> None:
        """Listening and proving write nothing that a read-only transaction forbids."""
        self.ask_nothing(f"ALTER DATABASE {self.database_name} SET default_transaction_read_only = on")
        await self.listening("changes", canary_interval_s=0.02)
        proven_at = self.status.listening_proven_at
        await until(lambda: self.status.listening_proven_at > proven_at)
        self.assertEqual(self.count("listening_lost"), 0)

    async def test_commits_that_wait_for_a_standby_that_is_gone(self) -> None:
        """No canary waits with them: it would hold up each NOTIFY of the database, for good."""
        try:
            self.ask_nothing("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
            self.ask_nothing("SELECT pg_reload_conf()")
            await until(lambda: self.ask("SHOW synchronous_standby_names") == [("nobody",)])
            await self.listening("changes", canary_interval_s=0.02)
            proven_at = self.status.listening_proven_at
            await until(lambda: self.status.listening_proven_at > proven_at)
            self.assertEqual(self.count("listening_lost"), 0)
        finally:
            self.ask_nothing("ALTER SYSTEM RESET synchronous_standby_names")
            self.ask_nothing("SELECT pg_reload_conf()")

    def ask_nothing(self, sql: str) -> None:
        with self.side.cursor() as cursor:
            cursor.execute(sql)


class GuardedNotificationsTests(ListenerTestCase):
    """The guarded session's part: a wait that ends, whatever happens, and leaves nothing."""

    async def open_and_listen(self) -> GuardedConnection:
        guard = await self.open()
        self.addCleanup(guard.close_and_passthrough, None)
        await guard.execute("LISTEN changes")
        return guard

    def hold_the_reactor(self, seconds: float) -> None:
        time.sleep(seconds)

    async def test_what_came_together_with_an_answer(self) -> None:
        """What libpq read with the answer to a statement is heard at once: no event of the socket would announce it."""
        guard = await self.open_and_listen()
        answer = guard.execute("SELECT pg_sleep(0.05)")
        self.hold_the_reactor(0.3)  # so that both are read in one go
        self.notify("changes", "1")
        self.hold_the_reactor(0.3)
        await answer
        began_at = reactor.seconds()
        (notification,) = await guard.notifications(began_at + LONG_S)
        self.assertEqual(notification.payload, "1")
        self.assertLess(reactor.seconds() - began_at, LONG_S / 2)

    async def test_a_wait_ends_at_its_moment_or_when_it_is_woken(self) -> None:
        """With nothing; and the session goes on."""
        guard = await self.open_and_listen()
        self.assertEqual(await guard.notifications(reactor.seconds() + 0.02), [])
        self.assertEqual(await guard.notifications(reactor.seconds() - 1), [])
        waiting = guard.notifications(reactor.seconds() + LONG_S)
        guard.wake()
        self.assertEqual(await waiting, [])
        guard.wake()  # nobody waits
        self.notify("changes", "1")
        self.assertEqual(len(await guard.notifications(reactor.seconds() + LONG_S)), 1)
        await guard.execute("SELECT 1")

    async def test_the_sessions_deadline_goes_on(self) -> None:
        """A wait ends with the session; renewed, its deadline is the new one, be it later or sooner."""
        guard = self.guard(1.0)
        self.addCleanup(guard.close_and_passthrough, None)
        await guard.connect(self.direct.connector, "test", LONG_S)
        guard.renew(reactor.seconds() + LONG_S)
        self.assertEqual(await guard.notifications(reactor.seconds() + 1.1), [])
        guard.renew(reactor.seconds() + 0.05)
        await self.assertFailure(guard.notifications(reactor.seconds() + LONG_S), DeadlineExceeded)
        self.assertEqual(our_timers(), [])
        guard.renew(reactor.seconds() + LONG_S)
        await self.assertFailure(guard.execute("SELECT 1"), DeadlineExceeded)
        self.assertEqual(our_timers(), [])

    async def test_fifty_times_lost_cancelled_and_closed(self) -> None:
        """A wait is notified of the loss, and ends when it is cancelled; nothing is left."""

        async def lost(number: int) -> None:
            guard = await self.open(port=self.network.port)
            waiting = guard.notifications(reactor.seconds() + LONG_S).addBoth(guard.close_and_passthrough)
            for _ in range(number % 4):
                await deferLater(reactor, 0)
            (self.network.truncate if number % 2 else self.network.reset)()
            try:
                await waiting
            finally:
                self.network.heal()

        async def cancelled(number: int) -> None:
            guard = await self.open()
            waiting = guard.notifications(reactor.seconds() + LONG_S).addBoth(guard.close_and_passthrough)
            for _ in range(number % 4):
                await deferLater(reactor, 0)
            waiting.cancel()
            await waiting

        await self.outlive(lost, DatabaseUnavailable)
        await self.outlive(cancelled, CancelledError)


class ChangedChannelsTests(ListenerTestCase):
    """`listen_to` while it runs."""

    async def test_channels_come_and_go_in_the_session_there_is(self) -> None:
        """New ones are heard, old ones stay, gone ones are not; and what came may have been missed before."""
        listener = await self.listening("kept", "gone")
        (pid,) = self.pids()
        listener.listen_to(["kept", "came"])
        await until(lambda: self.count("missed") == 2)
        for channel in ("gone", "came", "kept"):
            self.notify(channel, channel)
        await until(lambda: len(self.diary.payloads) == 2)
        self.assertEqual(self.diary.payloads, ["came", "kept"])
        self.assertEqual(self.pids(), [pid])
        listener.listen_to(["kept"])
        listener.listen_to(["kept"])
        self.notify("kept", "again")
        await until(lambda: len(self.diary.payloads) == 3)
        self.assertEqual(self.count("missed"), 2)  # nothing came
        self.assertEqual(self.pids(), [pid])

    async def test_at_any_moment_of_a_session(self) -> None:
        """Changed in any turn of the reactor, it ends with what was set last."""
        listener = self.make_listener("first", canary_interval_s=0.0)
        listener.startService()
        chance = random.Random(20240229)
        for number in range(100):
            for _ in range(chance.randrange(8)):
                await deferLater(reactor, 0)
            listener.listen_to([f"c{number}", f"d{number % 7}"])
        await self.until_proven()
        for number in range(100):
            self.notify(f"c{number}", str(number))
        self.notify("d1", "last")  # 99 % 7
        await until(lambda: "last" in self.diary.payloads)
        self.assertEqual(self.diary.payloads, ["99", "last"])
        self.assertEqual(self.count("listening_lost"), 0)

    async def test_no_channel_no_session(self) -> None:
        """Nothing is held while there is nothing to listen to, be it from the start or later."""
        before = await self.what_is_held()
        listener = self.make_listener()
        listener.startService()
        await deferLater(reactor, 0.05)
        self.assertEqual((self.status.connections, self.status.listening_wanted), (0, False))
        listener.listen_to(["changes"])
        self.assertTrue(self.status.listening_wanted)
        await self.until_proven()
        listener.listen_to([])
        self.assertEqual((self.status.connections, self.status.listening_wanted), (0, False))
        self.assertEqual(our_timers(), [])
        await self.check_left(before)
        listener.listen_to(["changes"])
        listener.listen_to([])
        listener.listen_to(["changes"])
        await self.until_proven(2)
        await self.check_stops(listener, before)

    async def test_changed_before_it_runs(self) -> None:
        """It begins with what was set last, and not before it is started."""
        listener = self.make_listener("first")
        listener.listen_to(["second"])
        await deferLater(reactor, 0.05)
        self.assertEqual(self.status.connections, 0)
        listener.startService()
        await self.until_proven()
        self.notify("first", "1")
        self.notify("second", "2")
        await until(lambda: self.diary.payloads)
        self.assertEqual(self.diary.payloads, ["2"])

    async def test_changed_and_stopped_by_what_it_calls(self) -> None:
        """`heard` and `missed` may do so as well."""
        before = await self.what_is_held()
        listener = self.make_listener("changes", heard=lambda *_: listener.listen_to([]))
        listener.startService()
        await self.until_proven()
        self.notify("changes", "1")
        await until(lambda: self.status.connections == 0)
        self.assertFalse(self.status.listening_wanted)
        self.observer.missed = listener.stopService
        listener.listen_to(["changes"])
        await until(lambda: not listener.running and self.status.connections == 0)
        self.assertEqual(self.count("internal_error"), 0)
        await self.check_left(before)


class LostTests(ListenerTestCase):
    """The session is lost, or the way to it, or the server."""

    def check_nothing_missed_silently(self, sent: dict[int, int]) -> None:
        """`sent` holds at which length of the diary each number was committed.

        A number is heard, or committed before it is reported that some may have been missed; and as long as a session
        is proven and not known to be lost, no number is left out.
        """
        heard = {int(payload) for payload in self.diary.payloads}
        missed_at = [place for place, entry in enumerate(self.diary) if entry[0] == "missed"]
        for number, place in sent.items():
            self.assertTrue(number in heard or missed_at[-1] >= place, number)
        places = [place for place, entry in enumerate(self.diary) if entry[0] == "heard"]
        for one, next_one in pairwise(places):
            step = int(self.diary[next_one][2]) - int(self.diary[one][2])
            self.assertGreater(step, 0)
            if step > 1:
                earlier = range(next_one, -1, -1)
                place = next(place for place in earlier if self.diary[place][0] != "heard")
                self.assertFalse(self.diary[place][0] == "missed" and place < one, self.diary[one - 1 : next_one + 1])
        # Each loss is reported once it listens again.
        states = [entry[0] for entry in self.diary if entry[0] != "heard"]
        for state, next_one in pairwise(states):
            allowed = {"listening_began": ["missed"], "missed": ["listening_lost"]}
            self.assertIn(next_one, allowed.get(state, ["listening_began", "listening_impossible", "listening_lost"]))

    async def write_amid(self, strikes: int, strike: Callable[[random.Random], None], mend: Callable[[], Any]) -> int:
        """Notify numbers all the time, `strike` between any two of them, and repair; return how many were sent."""
        chance = random.Random(20261231)
        sent: dict[int, int] = {}
        losses = self.count("listening_lost")

        def send() -> None:
            self.notify("numbers", str(len(sent)))
            sent[len(sent)] = len(self.diary)

        for _ in range(strikes):
            for _ in range(chance.randrange(1, 15)):
                send()
                await deferLater(reactor, chance.choice([0, 0, 0.001, 0.01]))
            strike(chance)
            send()
            await deferLater(reactor, chance.choice([0, 0.002, 0.02]))
            mend()
            if chance.random() < 0.7:
                await until(lambda: self.status.listening)
        await until(lambda: self.count("listening_lost") > losses)
        proofs = self.count("missed")
        mend()
        await until(lambda: self.status.listening and self.count("missed") >= proofs)
        await deferLater(reactor, 0.5)  # the last strike may not have been noticed yet
        await until(lambda: self.status.listening)
        while str(len(sent) - 1) not in self.diary.payloads[-1:]:
            send()
            await deferLater(reactor, 0.05)
        self.check_nothing_missed_silently(sent)
        self.assertGreater(self.count("missed"), strikes // 4)
        self.assertGreater(len(self.diary.payloads), len(sent) // 4)
        return len(sent)

    def terminate(self, chance: random.Random) -> None:
        """The listening session, mostly, or the one that proves it, if there is one."""
        found = [s.pid for s in sessions(self.server, self.database_name) if "listens" in s.application_name]
        if found:
            self.ask("SELECT pg_terminate_backend(%s)", chance.choice(found))

    async def test_sessions_terminated_at_random_moments(self) -> None:
        """A hundred times, while numbers are notified: none is lost silently."""
        before = await self.what_is_held()
        listener = await self.listening("numbers", **{**QUICK, "answer_within_s": LONG_S})
        await self.write_amid(100, self.terminate, lambda: None)
        await self.check_stops(listener, before)

    async def test_every_fault_of_the_network_at_random_moments(self) -> None:
        """Sixty times reset, truncated, silent, half-open, at any byte: none is lost silently."""
        before = await self.what_is_held()
        listener = await self.listening("numbers", **{**QUICK, "answer_within_s": 0.4, "connect_timeout_s": 1.0})
        network = self.network

        def strike(chance: random.Random) -> None:
            after = chance.choice([0, 0, chance.randrange(2000)])
            chance.choice(
                [
                    lambda: network.reset(after),
                    lambda: network.truncate(after),
                    lambda: network.silence(after),
                    network.half_open,
                ]
            )()

        await self.write_amid(60, strike, network.heal)
        await self.check_stops(listener, before)

    async def lose(self, strike: Callable[[], Any], mend: Callable[[], Any], **options: Any) -> None:
        """After `strike` the session is known to be lost; after the repair there is another, as good as the first."""
        before = await self.what_is_held()
        listener = await self.listening("numbers", **{**QUICK, **options})
        for round_ in range(3):
            proofs, losses = self.count("missed"), self.count("listening_lost")
            await as_awaitable(strike)
            await until(lambda losses=losses: self.count("listening_lost") > losses)
            self.assertFalse(self.status.listening)
            self.assertTrue(self.status.listening_problem)
            self.assertEqual(len(self.status.listening_problem.splitlines()), 1)
            self.notify("numbers", "missed")
            await as_awaitable(mend)
            await self.until_proven(proofs + 1)
            self.assertIsNone(self.status.listening_problem)
            self.notify("numbers", str(round_))
            await until(lambda round_=round_: str(round_) in self.diary.payloads)
        await self.check_stops(listener, before)

    async def test_reset(self) -> None:
        """A RST while nobody asks anything is noticed at once: no canary is under way."""
        await self.lose(self.network.reset, self.network.heal, **PATIENT)

    async def test_truncated(self) -> None:
        """So is a FIN."""
        await self.lose(self.network.truncate, self.network.heal, **PATIENT)

    async def test_silence(self) -> None:
        """Silence is noticed by the canary that does not come back."""
        await self.lose(self.network.silence, self.network.heal, answer_within_s=0.5, connect_timeout_s=1.0)

    async def test_half_open(self) -> None:
        """So is a session whose other end is gone."""
        await self.lose(self.network.half_open, self.network.heal, answer_within_s=0.5, connect_timeout_s=1.0)

    async def test_refused_for_a_while(self) -> None:
        """One line reports the loss, however many tries fail; they go on until one succeeds."""
        listener = await self.listening("numbers", **QUICK)
        await self.network.refuse()
        self.network.reset()
        await until(lambda: listener.failures.count > 5)
        self.assertEqual(self.count("listening_lost"), 1)
        (lost,) = [fields for event, fields in self.diary.log.events if event == "listening_lost"]
        self.assertEqual(sorted(lost), ["error", "retry_in_s"])
        self.assertIn("refused", self.status.listening_problem)  # the newest problem, not the first
        self.network.heal()
        await self.until_proven(2)
        self.assertEqual(listener.failures.count, 0)

    async def test_terminated(self) -> None:
        """A session that an administrator ends is replaced at once."""

        def strike() -> None:
            for pid in self.pids():
                self.ask("SELECT pg_terminate_backend(%s)", pid)

        await self.lose(strike, lambda: None, **PATIENT)

    async def test_a_cancelled_canary(self) -> None:
        """pg_cancel_backend at any moment does not stop the listener: it listens on, or again."""
        listener = await self.listening("numbers", **{**QUICK, "canary_interval_s": 0.0})
        sent = listener.canaries.sent
        while listener.canaries.sent < sent + 60:
            for pid in self.pids():
                self.ask("SELECT pg_cancel_backend(%s)", pid)
            await deferLater(reactor, 0)
        await until(lambda: self.status.listening)
        self.assertTrue(listener.running)

    async def test_a_server_that_restarts(self) -> None:
        """Both in order and at once."""
        self.addCleanup(self.server.start)

        ways = itertools.cycle(("fast", "immediate"))

        def strike() -> Any:
            return deferToThread(self.server.stop, next(ways))

        def mend() -> Any:
            return deferToThread(self.server.start)

        self.side.close()
        self.writer.close()
        self.notify_fresh()
        await self.lose(strike, mend)
        self.side = connect(self.server)

    def notify_fresh(self) -> None:
        """From now on a session for each notification, none if there is no server."""

        def notify(channel: str, payload: str) -> None:
            if self.server.running:
                query(self.server, self.database_name, "SELECT pg_notify(%s, %s)", (channel, payload))

        self.notify = notify  # type: ignore[method-assign]

    async def test_a_frozen_server(self) -> None:
        """The whole server under SIGSTOP: the canary detects it, nobody is held, and it listens again afterwards."""
        before = await self.what_is_held()
        listener = await self.listening("numbers", **{**QUICK, "connect_timeout_s": 0.5})
        self.server.freeze(backends=True)
        self.thaw_later([process.pid for process in self.server._frozen])
        await until(lambda: listener.failures.count > 3)
        self.assertFalse(self.status.listening)
        self.assertEqual(self.count("listening_lost"), 1)
        self.server.thaw()
        proofs = self.count("missed")
        await self.until_proven(proofs + 1)
        self.notify("numbers", "1")
        await until(lambda: self.diary.payloads)
        await self.check_stops(listener, before)

    async def test_a_frozen_postmaster(self) -> None:
        """Sessions that are open hear on; what is lost then comes back with the postmaster."""
        before = await self.what_is_held()
        listener = await self.listening("numbers", **{**QUICK, "connect_timeout_s": 0.5})
        self.thaw_later([self.server.pid])
        self.server.freeze()
        self.notify("numbers", "1")
        await until(lambda: self.diary.payloads)
        proven_at = self.status.listening_proven_at
        await until(lambda: self.status.listening_proven_at > proven_at)
        self.assertEqual(self.count("listening_lost"), 0)
        self.network.reset()
        await until(lambda: listener.failures.count > 3)
        self.server.thaw()
        self.network.heal()
        await self.until_proven(2)
        await self.check_stops(listener, before)

    async def test_down_at_the_start(self) -> None:
        """It listens once there is a server."""
        await self.network.refuse()
        listener = self.make_listener("numbers", **QUICK)
        listener.startService()
        await until(lambda: listener.failures.count > 2)
        self.assertEqual([entry[0] for entry in self.diary], ["listening_lost"])
        self.network.accept()
        await self.until_proven()


class CannotListenTests(ListenerTestCase):
    """LISTEN cannot work where the connection leads."""

    def lines(self, event: str) -> list[str]:
        return [fields["error"] for logged, fields in self.diary.log.events if logged == event]

    async def test_a_standby(self) -> None:
        """It reports that in one line, and goes on trying: once promoted, the server is listened to."""
        with running_standby(self.server) as dsn:
            listener = self.make_listener("changes", dsn=dsn(database=self.database_name), **QUICK)
            listener.startService()
            await until(lambda: self.status.listening_problem)
            self.assertEqual(self.status.listening_problem, "the server is a standby, where LISTEN cannot work")
            await deferLater(reactor, 0.5)  # it has been tried again meanwhile
            self.assertEqual(
                self.lines("listening_impossible"),
                ["the server is a standby, where LISTEN cannot work; datasets are refreshed on their intervals"],
            )
            self.assertEqual(len(self.diary), 1)
            with closing(self.connect(dsn)) as side, side.cursor() as cursor:
                cursor.execute("SELECT pg_promote()")
                await self.until_proven()
                cursor.execute("NOTIFY changes, 'promoted'")
                await until(lambda: self.diary.payloads)
            self.assertEqual(self.diary.payloads, ["promoted"])
            await listener.stopService()

    def connect(self, dsn: Callable[..., str]) -> Any:
        return connect(self.server, self.database_name, port=dsn().rpartition(":")[2].partition("/")[0])

    @contextmanager
    def pool(self, **options: Any) -> Any:
        if pgbouncer.PROGRAM is None:
            pytest.skip(pgbouncer.NEEDED)
        with running_pgbouncer(self.server, **options) as dsn:
            yield dsn

    async def test_a_pool_of_transactions(self) -> None:
        """LISTEN succeeds there, and even our own notification comes back to the statement that sent it; it is found
        out, reported in one line, tried again; and no server session of the pool goes on listening for us."""
        with self.pool(pool_size=1) as dsn:
            options = {**QUICK, "answer_within_s": 0.5}
            listener = self.make_listener("changes", dsn=dsn(database=self.database_name), **options)
            listener.startService()
            await until(lambda: self.count("listening_impossible"))
            tried = listener.canaries.sent
            await until(lambda: listener.canaries.sent > tried + 2)
            (line,) = self.lines("listening_impossible")
            self.assertIn("PgBouncer", line)
            self.assertIn("name a direct connection in postgres.dsn", self.status.listening_problem)
            self.assertFalse(self.status.listening)
            self.assertLessEqual(self.count("listening_lost"), 1)
            self.assertEqual(self.count("missed"), 0)
            await listener.stopService()
            await until(lambda: self.status.connections == 0)
            # A stop during the proof leaves what it listened to; a try that is seen to its end does not.
            listener = self.make_listener(
                "changes", dsn=dsn(database=self.database_name), **{**options, "retry_slowly_s": LONG_S}
            )
            listener.startService()
            await until(lambda: self.count("listening_impossible") == 2)
            with closing(self.connect(dsn)) as side, side.cursor() as cursor:
                cursor.execute("SELECT pg_listening_channels()")
                self.assertEqual(cursor.fetchall(), [])
            await listener.stopService()

    async def test_a_direct_connection_after_a_pool(self) -> None:
        """Once the way is direct, it listens, and reports that."""
        with self.pool() as dsn:
            listener = self.make_listener(
                "changes", dsn=dsn(database=self.database_name), **{**QUICK, "answer_within_s": 0.5}
            )
            listener.startService()
            await until(lambda: self.count("listening_impossible"))
            listener.configure(parse(self.server.dsn(database=self.database_name)), LONG_S)
            await self.until_proven()
            self.assertIsNone(self.status.listening_problem)
            await listener.stopService()

    async def test_a_refresh_through_a_pool_of_transactions(self) -> None:
        """What a refresh does is done in one transaction: it works there, again and again, two at a time."""
        with self.pool() as dsn:
            database = Database(reactor, parse(dsn(database=self.database_name)), LONG_S, self.status)
            self.addCleanup(database.stop)
            query_ = "SELECT i AS id, repeat('x', 100) AS filler FROM generate_series(1, 5000) i"
            for _ in range(5):
                into = [rows_builder(), rows_builder()]
                reads = [read_one(database, settings(query_), lambda rows=rows: rows) for rows in into]
                for read in reads:
                    await read
                self.assertEqual([rows.count for rows in into], [5000, 5000])
            # Nothing that one of them set is left for the next client.
            with closing(self.connect(dsn)) as side, side.cursor() as cursor:
                for name in ("search_path", "statement_timeout", "lock_timeout"):
                    cursor.execute(f"SELECT source FROM pg_settings WHERE name = '{name}'")
                    self.assertEqual(cursor.fetchall(), [("default",)])


class StopTests(ListenerTestCase):
    """stopService fires in any state, and nothing is left."""

    async def test_at_any_moment(self) -> None:
        """After 0, 1, 2 … turns of the reactor, and after 0, 2, 4 … ms."""
        before = await self.what_is_held()
        for number in range(120):
            listener = self.make_listener("changes", **{**QUICK, "canary_interval_s": 0.0})
            listener.startService()
            if number % 2:
                await deferLater(reactor, number * 0.001)
            else:
                for _ in range(number):
                    await deferLater(reactor, 0)
            await listener.stopService()
            self.assertEqual(our_timers(), [])
            self.assertEqual((self.status.connections, self.status.listening), (0, False))
        await self.check_left(before)

    async def test_connecting_to_a_silent_host(self) -> None:
        """The connection is accepted, and then the server sends nothing."""
        before = await self.what_is_held()
        self.network.silence()
        listener = self.make_listener("changes")
        listener.startService()
        await until(lambda: self.network.connections == 1)
        await self.check_stops(listener, before)

    async def test_waiting_to_retry(self) -> None:
        """The server was not there, and is tried again in a while."""
        before = await self.what_is_held()
        await self.network.refuse()
        listener = self.make_listener("changes", retry_initial_s=LONG_S, retry_max_s=LONG_S)
        listener.startService()
        await until(lambda: self.count("listening_lost"))
        await self.check_stops(listener, before)

    async def test_amid_a_flood(self) -> None:
        """Notifications are still to be handed on."""
        before = await self.what_is_held()
        listener = await self.listening("numbers")
        with self.writer.cursor() as cursor:
            cursor.execute("SELECT pg_notify('numbers', i::text) FROM generate_series(1, 10000) i")
        await until(lambda: self.diary.payloads)
        await self.check_stops(listener, before)
        heard = len(self.diary.payloads)
        await deferLater(reactor, 0.05)
        self.assertEqual(len(self.diary.payloads), heard)

    async def test_stopped_and_started_again(self) -> None:
        """As good as the first time."""
        before = await self.what_is_held()
        listener = await self.listening("changes")
        for number in range(3):
            await self.check_stops(listener, before)
            listener.startService()
            await self.until_proven(number + 2)
        self.notify("changes", "1")
        await until(lambda: self.diary.payloads)
        await self.check_stops(listener, before)
