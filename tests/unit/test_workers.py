"""Laws of the main process about its workers: starts, restarts, hangs and ends; without a process."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any
from unittest import mock

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.app.effective import effective, needs_restart
from cacheservice.app.workers.heartbeat import Heartbeat
from cacheservice.app.workers.link_log import LinkLog, LogSender, plain
from cacheservice.app.workers.member import Member, State, Surroundings, Timing
from cacheservice.app.workers.spawn import Ending, environment
from cacheservice.app.workers.supervisor import Supervisor
from cacheservice.config import Settings, for_workers, from_main
from tests.kit.clocks import started_clock
from tests.kit.links import LinkPair
from tests.kit.logs import Log

PLAIN: dict[str, Any] = {
    "postgres": {
        "dsn": "postgresql://reader:hidden@db/shop",
        "settings": {"work_mem": "64MB"},
        "search_path": "pg_catalog, public",
    },
    "resp": {"password": "of resp", "host": "::"},
    "http": {"token": "to read", "admin_token": "to change"},
    "workers": {"processes": 2},
    "datasets": {
        "products": {
            "name": "products",
            "query": "TABLE products",
            "key": ["shop", "id"],
            "key_separator": "|",
            "key_escape": True,
            "watch": [{"table": "public.products", "key": ["shop", "id"]}],
            "settings": {"WORK_MEM": "1GB", "enable_seqscan": False},
        },
        "users": {"name": "users", "query": "SELECT 1 AS id", "key": "id", "interval_s": 7.5},
    },
}


def settings_of(**tables: dict[str, Any]) -> Settings:
    changed = {name: {**PLAIN.get(name, {}), **keys} for name, keys in tables.items()}
    return Settings.model_validate({**PLAIN, **changed})


class Transfer(SynchronousTestCase):
    def test_round_trip(self) -> None:
        """A worker has the settings of the main process, except the DSN, which it does not get."""
        settings = settings_of()
        sent = for_workers(settings)
        received = from_main(sent)
        self.assertNotIn("hidden", str(sent))
        postgres = settings.postgres.model_copy(update={"dsn": received.postgres.dsn})
        self.assertEqual(received, settings.model_copy(update={"postgres": postgres}))
        self.assertEqual(list(received.datasets), ["products", "users"])
        self.assertEqual(received.resp.password.get_secret_value(), "of resp")
        self.assertEqual(for_workers(received), sent)

    def test_over_a_link(self) -> None:
        """A link carries them."""
        pair = LinkPair()
        received: list[Any] = []

        def handler(settings: Any) -> None:
            received.append(settings)

        pair.worker.handle("settings", handler)
        pair.main.send("settings", settings=for_workers(settings_of()))
        pair.deliver()
        self.assertEqual(from_main(received[0]), from_main(for_workers(settings_of())))

    def test_environment(self) -> None:
        """A worker inherits what Python and the C library need, and nothing else."""
        kept = environment(
            {
                "PATH": "/bin", "LC_ALL": "C", "PYTHONPATH": "/more", "PGPASSWORD": "x",
                "CACHESERVICE_POSTGRES__DSN": "x", "AWS_SECRET": "x",
            }
        )  # fmt: skip
        self.assertEqual(set(kept), {"PATH", "LC_ALL", "PYTHONPATH"})
        self.assertTrue(kept["PYTHONPATH"].endswith(":/more"))


class Effective(SynchronousTestCase):
    def test_keys_that_need_a_restart(self) -> None:
        """They keep their old values, and the others are in effect; a secret is only replaced by another."""
        started = settings_of()
        changed = settings_of(
            resp={"password": "new", "port": 7000},
            http={"token": "", "admin_token": "new, too"},
            limits={"max_connections": 7, "max_answer_s": 1.0},
            workers={"processes": 5},
        )
        self.assertEqual(
            needs_restart(started, changed), ["resp.port", "http.token", "limits.max_answer_s", "workers.processes"]
        )
        now = effective(started, changed)
        self.assertEqual(
            (now.resp.password.get_secret_value(), now.http.token.get_secret_value(), now.limits.max_connections),
            ("new", "to read", 7),
        )
        self.assertEqual(needs_restart(started, now), [])
        self.assertEqual((now.resp.port, now.workers.processes), (started.resp.port, 2))


class LogOverALink(SynchronousTestCase):
    def setUp(self) -> None:
        self.pair = LinkPair()
        self.sender = LogSender()
        self.log = LinkLog(self.sender)
        self.received: list[Any] = []

        def handler(level: str, event: str, fields: Any) -> None:
            self.received.append((level, event, fields))

        self.pair.main.handle("log", handler)

    def test_events(self) -> None:
        """They arrive with their level and their fields; values that a link does not carry are text."""
        self.sender.send_over(self.pair.worker)
        self.log.bind(port="resp", path=OSError("why")).bind(port="http").warning("event", huge=1 << 70, pair=(1, 2))
        self.log.info("no_fields")
        self.pair.deliver()
        fields = {"port": "http", "path": "why", "huge": str(1 << 70), "pair": [1, 2]}
        self.assertEqual(self.received, [("warning", "event", fields), ("info", "no_fields", {})])

    def test_a_link_that_is_not_read(self) -> None:
        """Events are dropped and counted."""
        self.sender.send_over(self.pair.worker)
        self.pair.worker.send_frames(bytes(6 << 20))
        for _ in range(3):
            self.log.error("lost")
        self.pair.deliver()
        self.log.info("seen")
        self.pair.deliver()
        self.assertEqual(self.received, [("warning", "log_lines_lost", {"lines": 3}), ("info", "seen", {})])

    def test_plain(self) -> None:
        """Mappings and sequences keep their form."""
        self.assertEqual(plain({1: [None, True, b"x", {2.5}]}), {"1": [None, True, b"x", "{2.5}"]})


class Heartbeats(SynchronousTestCase):
    def setUp(self) -> None:
        self.pair = LinkPair()
        self.clock = self.pair.clock
        self.found: list[str] = []
        self.beat = Heartbeat(self.pair.main, self.clock, 1.0, 4, self)
        self.pings = 0
        self.pair.worker.handle("ping", self.ping)

    def ping(self) -> None:
        self.pings += 1

    def answering(self, answers: bool) -> None:
        self.found.append("answers" if answers else "silent")

    def hung(self) -> None:
        self.found.append("hung")

    def test_answers(self) -> None:
        """There is one ping in each interval while they are answered."""
        self.beat.start()
        for _ in range(20):
            self.pair.deliver()
            self.clock.advance(1.0)
        self.beat.stop()
        self.pair.deliver()
        self.assertEqual((self.pings, self.found), (21, []))

    def test_silence(self) -> None:
        """Without an answer in two intervals the other end is silent, and later it hangs."""
        self.beat.start()
        seen = []
        for _ in range(6):
            self.clock.advance(1.0)
            seen.append(len(self.found))
        self.assertEqual((seen, self.found), ([0, 1, 1, 2, 2, 2], ["silent", "hung"]))

    def test_a_late_answer(self) -> None:
        """An end that was silent answers again."""
        self.beat.start()
        self.clock.pump([1.0] * 3)
        self.pair.deliver()
        self.assertEqual(self.found, ["silent", "answers"])
        self.clock.pump([1.0] * 2)
        self.assertEqual(self.found, ["silent", "answers"])
        self.beat.stop()
        self.pair.cut()
        self.assertEqual(self.found, ["silent", "answers"])

    def test_a_suspended_machine(self) -> None:
        """If this process did not run for an hour, that is one interval: the answer may wait to be read."""
        self.beat.start()
        self.clock.advance(3600.0)
        self.pair.deliver()
        self.clock.pump([1.0] * 2)
        self.pair.deliver()
        self.assertGreater(self.pings, 1)
        self.assertEqual(self.found, [])
        self.beat.stop()


class FakeProcess:
    """A process that does not end by itself: tests call `end`."""

    def __init__(self, pid: int, ended: Callable[[Ending], None]) -> None:
        self.pid = pid
        self.end = ended
        self.kills = 0

    def kill(self) -> None:
        self.kills += 1


class Feed:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")


class FakesTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock: Clock = started_clock()
        self.log = Log()
        self.processes: list[FakeProcess] = []
        self.feeds: list[Feed] = []
        self.pauses: list[int] = []
        self.fails = 0
        self.pairs: list[LinkPair] = []
        for name, fake in (("adopt", self.adopt), ("socket.socketpair", self.socketpair)):
            self.patch_name(name, fake)
        self.surroundings = Surroundings(self.spawn, self.attach, self.pause_s, Timing(), self.clock, self.log)

    def patch_name(self, name: str, fake: object) -> None:
        patched = mock.patch(f"cacheservice.app.workers.member.{name}", fake)
        patched.start()
        self.addCleanup(patched.stop)

    def socketpair(self) -> tuple[mock.Mock, mock.Mock]:
        return mock.Mock(spec=socket.socket), mock.Mock(spec=socket.socket)

    def adopt(self, reactor: object, connected: object, link: Any) -> Any:
        """Connect the link to the worker's end of a pair."""
        pair = LinkPair()
        pair.worker.handle("ping", Deferred)
        pair.join(link)
        self.pairs.append(pair)
        return link

    def attach(self, number: int, link: object) -> Feed:
        self.feeds.append(Feed())
        return self.feeds[-1]

    def spawn(self, link: object, ended: Callable[[Ending], None]) -> FakeProcess:
        if self.fails:
            self.fails -= 1
            raise BlockingIOError(11, "Resource temporarily unavailable")
        self.processes.append(FakeProcess(100 + len(self.processes), ended))
        return self.processes[-1]

    def pause_s(self, failures: int) -> float:
        self.pauses.append(failures)
        return 2.0


class Members(FakesTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.changes: list[bool] = []
        self.member = Member(1, self, self.surroundings)

    def settings(self) -> dict[str, Any]:
        return {"a": 1}

    def changed(self) -> None:
        self.changes.append(self.member.accepts)

    def send(self, name: str, **fields: Any) -> None:
        """Send an event of the worker that runs now."""
        self.pairs[-1].worker.send(name, **fields)
        self.pairs[-1].deliver()

    def serve(self) -> None:
        self.send("hello")
        self.send("serving")

    def events(self) -> list[str]:
        return [event for event in self.log.names() if event != "worker_started"]

    def test_a_start(self) -> None:
        """A worker that has started gets its settings and then the snapshots, and serves."""
        received: list[Any] = []
        self.member.start()
        self.assertEqual((self.member.state, self.member.pid, self.member.link), (State.STARTING, 100, None))
        self.assertEqual(self.feeds[0].calls, [])
        self.pairs[0].worker.handle("settings", lambda **fields: received.append(fields))
        self.send("hello")
        self.assertEqual(received, [{"settings": {"a": 1}, "number": 1, "incarnation": 1}])
        self.assertEqual((self.member.state, self.feeds[0].calls), (State.FILLING, ["start"]))
        self.send("serving")
        self.assertEqual(self.member.state, State.SERVING)
        self.member.send("settings", settings={"a": 1})
        self.pairs[0].deliver()
        self.assertEqual(received[1:], [{"settings": {"a": 1}}])
        self.assertEqual(self.log.names(), ["worker_started", "worker_serving"])
        self.assertEqual(self.changes, [True])

    def test_restarts(self) -> None:
        """A worker that ends is started again after a pause, which grows until one lives long enough."""
        self.member.start()
        for number in range(3):
            self.serve()
            self.processes[-1].end(Ending(None, "SIGKILL"))
            self.assertEqual((self.member.state, self.member.pid), (State.WAITING, None))
            self.assertEqual(self.feeds[-1].calls, ["start", "stop"])
            self.clock.advance(2.0)
            self.assertEqual((self.member.state, self.member.restarts), (State.STARTING, number + 1))
        self.pairs[-1].worker.handle("ping", lambda: None)
        self.serve()
        for _ in range(60):
            self.clock.advance(1.0)
            self.pairs[-1].deliver()
        self.processes[-1].end(Ending(1, None))
        self.assertEqual(self.pauses, [0, 1, 2, 0])
        self.assertEqual(self.log.named("worker_ended")[0], {
            "worker": 1, "pid": 100, "exit_code": None, "signal": "SIGKILL"
        })  # fmt: skip
        self.assertEqual(self.log.named("worker_restarting")[0], {"worker": 1, "in_s": 2.0})

    def test_no_process_left(self) -> None:
        """A machine that has no room for a process may have it later."""
        self.fails = 2
        self.member.start()
        self.clock.pump([2.0, 2.0])
        self.assertEqual(self.member.state, State.STARTING)
        self.assertEqual(self.pauses, [0, 1])
        self.assertEqual(self.events().count("worker_not_started"), 2)

    def test_a_worker_that_hangs(self) -> None:
        """Without an answer for 10 s, it is killed, and the next one is started."""
        self.member.start()
        self.serve()
        self.clock.pump([1.0] * 9)
        self.assertEqual(self.processes[0].kills, 0)
        self.clock.advance(1.0)
        self.assertEqual((self.processes[0].kills, self.member.state), (1, State.ENDING))
        self.assertEqual(self.changes, [True, False, False])
        self.processes[0].end(Ending(None, "SIGKILL"))
        self.assertEqual(self.events(), ["worker_serving", "worker_hung", "worker_ended", "worker_restarting"])
        self.clock.advance(2.0)
        self.assertEqual(self.member.state, State.STARTING)

    def test_a_worker_that_does_not_start(self) -> None:
        """It has a minute."""
        self.member.start()
        self.clock.advance(59.0)
        self.assertEqual(self.processes[0].kills, 0)
        self.clock.advance(1.0)
        self.assertEqual(self.processes[0].kills, 1)

    def test_a_lost_link(self) -> None:
        """A process that does not end after its link is killed."""
        self.member.start()
        self.serve()
        self.pairs[0].cut()
        self.assertEqual((self.member.state, self.processes[0].kills), (State.ENDING, 0))
        self.clock.advance(3.0)
        self.assertEqual(self.processes[0].kills, 1)
        self.processes[0].end(Ending(None, "SIGKILL"))
        self.assertEqual(self.member.state, State.WAITING)

    def test_a_stop(self) -> None:
        """A worker ends by itself; the Deferred fires when its process has ended."""
        self.member.start()
        self.serve()
        asked: list[str] = []
        self.pairs[0].worker.handle("stopping", lambda: asked.append("stopping"))
        self.pairs[0].worker.handle("stop", lambda: asked.append("stop"))
        self.member.send("stopping")
        stopped = self.member.stop()
        self.pairs[0].deliver()
        self.assertEqual(asked, ["stopping", "stop"])
        self.pairs[0].cut()
        self.assertNoResult(stopped)
        self.processes[0].end(Ending(0, None))
        self.successResultOf(stopped)
        self.assertEqual((self.member.state, self.processes[0].kills), (State.STOPPED, 0))
        self.assertEqual(self.log.lines[-1][:2], ("info", "worker_ended"))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_stop_that_hangs(self) -> None:
        """After 3 s it is killed, even if it has not started yet."""
        self.member.start()
        stopped = self.member.stop()
        self.clock.advance(3.0)
        self.assertEqual(self.processes[0].kills, 1)
        self.assertNoResult(stopped)
        self.processes[0].end(Ending(None, "SIGKILL"))
        self.successResultOf(stopped)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_stop_before_a_restart(self) -> None:
        """The restart is cancelled."""
        self.member.start()
        self.processes[0].end(Ending(1, None))
        self.successResultOf(self.member.stop())
        self.assertEqual((self.clock.getDelayedCalls(), self.member.state), ([], State.STOPPED))

    def test_the_log(self) -> None:
        """Events of the worker are logged with its number, whatever fields it sends."""
        self.member.start()
        self.send("log", level="warning", event="seen", fields={"worker": 9, "event": "x", "port": "resp"})
        self.send("log", level="bind", event="odd", fields={})
        self.assertEqual(
            self.log.lines[-2:], [("warning", "seen", {"worker": 1, "port": "resp"}), ("error", "odd", {"worker": 1})]
        )


class Supervisors(FakesTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.clock.callWhenRunning = lambda call: call()  # type: ignore[attr-defined]
        self.supervisor = Supervisor(settings_of(workers={"processes": 3}), self.surroundings)
        self.supervisor.startService()
        self.accepted: dict[int, list[int]] = {}
        self.received: list[Any] = []
        for place in range(3):
            self.serve(place, place + 1)

    def serve(self, place: int, number: int) -> None:
        """Have the process that was started at a place serve, as the worker with a number."""
        worker = self.pairs[place].worker

        def accept(numbers: list[int]) -> None:
            self.accepted[number] = numbers

        worker.handle("accept", accept)
        worker.handle("settings", lambda settings, **more: self.received.append(settings))
        worker.send("hello")
        worker.send("serving")
        self.deliver()

    def deliver(self) -> None:
        for pair in self.pairs * 2:  # what one worker sends may have the main process send to another one
            pair.deliver()

    def test_each_accepts_from_its_own_socket(self) -> None:
        """While all workers serve, none accepts from the socket of another one."""
        self.assertEqual(self.accepted, {1: [1], 2: [2], 3: [3]})

    def test_a_worker_that_ends(self) -> None:
        """The others accept from its socket until the next process serves."""
        self.processes[1].end(Ending(None, "SIGKILL"))
        self.deliver()
        self.assertEqual(self.accepted, {1: [1, 2], 2: [2], 3: [2, 3]})
        self.clock.advance(2.0)
        self.serve(3, 2)
        self.assertEqual(self.accepted, {1: [1], 2: [2], 3: [3]})

    def test_settings(self) -> None:
        """A reload reaches the workers that run, and those that are started later."""
        changed = settings_of(workers={"processes": 3}, resp={"password": "new"})
        self.received.clear()
        self.supervisor.apply(changed)
        self.deliver()
        self.assertEqual([each["resp"]["password"] for each in self.received], ["new"] * 3)
        self.assertEqual(self.supervisor.settings(), for_workers(changed))
        self.assertEqual(self.received[0], for_workers(changed))

    def test_the_stop(self) -> None:
        """It ends when all processes have ended."""
        stopped = self.supervisor.stopService()
        self.deliver()
        for process in self.processes[:2]:
            process.end(Ending(0, None))
        self.assertNoResult(stopped)
        self.processes[2].end(Ending(0, None))
        self.successResultOf(stopped)
        self.assertEqual(self.clock.getDelayedCalls(), [])
