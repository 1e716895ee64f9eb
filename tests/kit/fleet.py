"""A main process and its workers in one process: real parts, whose links a test delivers."""

from __future__ import annotations

from itertools import count
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from cacheservice.app.workers.connections import SharedConnections, SharedMemory
from cacheservice.app.workers.member import State
from cacheservice.app.workers.part import CountsService, Incarnation, Part
from cacheservice.app.workers.questions import Sources
from cacheservice.app.workers.whole import Whole
from cacheservice.cache.cache import Cache
from cacheservice.cache.counts import Histogram
from cacheservice.ops.exposition import Metrics
from cacheservice.ops.stall import BOUNDS_S
from cacheservice.ports.admission import Door, Room
from cacheservice.ports.clients import Limits
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.http import AccessSettings, HttpFactory, Served
from cacheservice.ports.http.factory import assembled
from cacheservice.ports.http.whole import Answers, CheckedElsewhere
from cacheservice.ports.resp.connection import RespFactory
from cacheservice.ports.rotation import ClientSecrets
from tests.kit.clocks import one_turn
from tests.kit.datasets import declared
from tests.kit.fake_refreshes import FakeRefreshes
from tests.kit.links import LinkPair
from tests.kit.logs import Log
from tests.kit.wire import Wire

SECRETS = ClientSecrets("open sesame", "read", "operate")
MOST = 10


class FakeLife:
    """The process of a worker, as its supervisor knows it."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.starts = 0
        self.pid: int | None = None
        self.state = State.STOPPED

    @property
    def restarts(self) -> int:
        return max(0, self.starts - 1)

    def begin(self) -> None:
        self.starts += 1
        self.pid, self.state = 1000 + self._number, State.FILLING

    def serve(self) -> None:
        self.state = State.SERVING

    def end(self) -> None:
        self.pid, self.state = None, State.WAITING


class FleetWorker:
    """One worker: its cache, its ports, and both ends of its link."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        clock = fleet.clock
        self.number = number
        self.pair = LinkPair(clock)
        self.cache = Cache(fleet.settings, clock.seconds)
        incarnation = Incarnation(number, fleet.lives[number].starts, fleet.processes)
        self.part = Part(incarnation, SharedConnections(fleet.memory.descriptor), self.cache, self.pair.worker)
        freshness = Freshness(self.part.main, self.cache.database, clock)
        self.log = Log()
        secrets = self.part.secrets(fleet.secrets, self.log)

        def limits(port: str) -> Limits:
            door = Door(port, Room(), 2, self.log, clock.seconds, self.part.tally(port))
            return Limits(MOST, 60.0, door=door)

        self.resp = RespFactory(
            cache=self.cache,
            freshness=freshness,
            limits=limits("resp"),
            clock=clock,
            password=fleet.secrets.password,
            look=secrets.look,
        )
        self.http = HttpFactory(
            Served(self.cache, freshness, self.part.main, main=self.part.main),
            AccessSettings(fleet.secrets.token, fleet.secrets.admin_token, look=secrets.look),
            limits("http"),
            clock,  # type: ignore[arg-type]  # no test here needs threads
        )
        secrets.watch(lambda changed: self.resp.replace_password(changed.password))
        secrets.watch(lambda changed: self.http.replace_tokens(changed.token, changed.admin_token))
        self.part.add_resp(self.resp)
        self.part.add_http(self.http)
        self.lateness = Histogram(BOUNDS_S)
        self.counts = CountsService(self.cache, self.part, self.lateness, dict, self.pair.worker, clock)
        self._fleet = fleet
        self._ports = count(40_000)

    def connect_resp(self, host: str = "192.0.2.1") -> Wire:
        return self._connect(self.resp, host)

    def connect_http(self, host: str = "192.0.2.1") -> Wire:
        return self._connect(self.http, host)

    def _connect(self, factory: RespFactory | HttpFactory, host: str) -> Wire:
        class Peer(Wire):
            def getPeer(_) -> IPv4Address:  # noqa: N805
                return IPv4Address("TCP", host, port)

            def getHost(_) -> IPv4Address:  # noqa: N805
                return IPv4Address("TCP", "192.0.2.200", 6379)

        port = next(self._ports)
        return Peer(factory.buildProtocol(None))  # type: ignore[arg-type]

    def get(self, target: str, token: str = "", method: str = "GET", host: str = "192.0.2.1") -> bytes:
        """Send a request on a new connection; return what has been sent once nothing more comes."""
        wire = self.connect_http(host)
        wire.receive(request(target, token, method))
        self._fleet.settle(50)
        if wire.is_open:
            wire.client_leaves()
        self._fleet.settle()
        return wire.take()


class Fleet:
    """A main process with the datasets products and prices, and its workers by number."""

    def __init__(self, clock: Clock, processes: int = 2, secrets: ClientSecrets = SECRETS) -> None:
        self.clock = clock
        self.processes = processes
        self.secrets = secrets
        self.settings = [declared("products"), declared("prices")]
        self.cache = Cache(self.settings, clock.seconds)
        self.refreshes = FakeRefreshes()
        self.memory = SharedMemory()
        connections = SharedConnections(self.memory.descriptor)
        self.whole = Whole(processes, self.cache, connections, {"resp": MOST, "http": MOST}, clock)
        self.metrics = Metrics(self.cache, Histogram(BOUNDS_S), clock)
        self.metrics.prepare_by(self.whole.updated)
        for name, port in self.whole.ports.items():
            self.metrics.add_port(name, port)
        freshness = Freshness(self.refreshes, self.cache.database, clock)  # type: ignore[arg-type]
        served = Served(self.cache, freshness, self.refreshes, self.metrics)  # type: ignore[arg-type]
        access = CheckedElsewhere(has_commands=bool(secrets.admin_token))
        self.assembled = assembled(served, access, clock)  # type: ignore[arg-type]
        self.looking: Deferred[None] | None = None
        self.workers: dict[int, FleetWorker] = {}
        self.lives = {number: FakeLife(number) for number in range(1, processes + 1)}
        self.whole.follow(list(self.lives.values()))
        for number in range(1, processes + 1):
            self.start(number)
        self.settle()

    def look(self) -> Deferred[None] | None:
        return self.looking

    def start(self, number: int) -> FleetWorker:
        """Start a worker, as the supervisor does."""
        self.lives[number].begin()
        worker = self.workers[number] = FleetWorker(self, number)
        answers = Answers(self.assembled.routes)
        sources = Sources(self.cache, self.refreshes, answers, self.look, self.whole)  # type: ignore[arg-type]
        self.whole.started(number, worker.pair.main, sources)
        worker.counts.startService()
        self.settle()
        self.lives[number].serve()
        return worker

    def kill(self, number: int) -> None:
        """End a worker without a warning."""
        worker = self.workers.pop(number)
        worker.pair.cut()
        worker.counts.stopService()
        worker.resp.close_clients()
        worker.http.close_clients()
        self.whole.ended(number)
        self.lives[number].end()

    def settle(self, turns: int = 30) -> None:
        """Deliver all messages, and take the turns that are due."""
        for _ in range(turns):
            for worker in self.workers.values():
                worker.pair.deliver()
            one_turn(self.clock)

    def close(self) -> None:
        """End everything; nothing is left."""
        for number in list(self.workers):
            self.kill(number)
        self.assembled.stop()
        self.settle()
        left = [str(call) for call in self.clock.getDelayedCalls()]
        assert left == [], left

    def both(self) -> list[Any]:
        return list(self.workers.values())


def request(target: str, token: str = "", method: str = "GET") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: test", *([f"Authorization: Bearer {token}"] if token else [])]
    return "\r\n".join([*lines, "", ""]).encode()
