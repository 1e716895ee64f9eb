"""The parts of a worker: a cache that the main process fills, and the ports for readers.

A worker gets messages in this order: `settings`, then the frames of all snapshots, then `live`, on which it begins to
accept clients. `accept` names the workers from whose sockets it accepts them. Later `settings` are those of a reload.
`stopping` closes the RESP port, and `stop` ends the worker.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from twisted.application.service import MultiService, Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import ServerFactory

from cacheservice.app.ports import Ports, Shared
from cacheservice.app.workers import descriptors
from cacheservice.app.workers.part import CountsService, Incarnation, Part, inherited_connections
from cacheservice.base.interfaces import Json, Log, Reactor
from cacheservice.cache.cache import Cache
from cacheservice.cache.drain import Drain
from cacheservice.config import Settings, from_main
from cacheservice.ops.exposition import Metrics
from cacheservice.ops.stall import StallWatch
from cacheservice.ports.held import HeldSnapshots
from cacheservice.ports.listen import PortService
from cacheservice.ports.shared_listen import AdoptedPort
from cacheservice.replication.follower import Follower
from cacheservice.replication.link import Handler, Link
from cacheservice.replication.sender import COMMIT, LIVE, WITHDRAW
from cacheservice.sources.frames.clocks import Clocks


class Worker:
    """The process of a worker, from its settings to its end.

    :param end: ends the process. It is called once, with the exit code.
    """

    def __init__(self, reactor: Reactor, link: Link, log: Log, end: Callable[[int], None]) -> None:
        self._reactor = reactor
        self._link = link
        self._log = log
        self._end = end
        self._serving: Serving | None = None
        self._is_ending = False
        handlers: dict[str, Handler] = {
            "settings": self._settings,
            COMMIT: self._commit,
            WITHDRAW: self._withdraw,
            LIVE: self._live,
            "accept": self._accept,
            "stopping": self._stopping,
            "stop": self.stop,
        }
        for name, handler in handlers.items():
            link.handle(name, handler)
        link.handle("ping", lambda: None)

    def start(self) -> None:
        """Ask for the settings."""
        self._link.send("hello")

    def received(self, data: bytes) -> None:
        """Publish frames of the main process."""
        if self._serving is not None and not self._is_ending:
            self._serving.follower.received(data)

    def lost(self, _: str) -> None:
        """End, because the main process has ended or because everything is sent."""
        if self._is_ending:
            self._end(0)
        else:
            self._is_ending = True
            self._stop_serving().addBoth(lambda _: self._end(1))

    def stop(self) -> None:
        """Close the ports, send the last lines of the log, and end."""
        if not self._is_ending:
            self._is_ending = True
            self._stop_serving().addBoth(lambda _: self._link.finish())

    def _settings(self, settings: Mapping[str, Json], number: int = 0, incarnation: int = 0) -> None:
        if self._serving is not None:
            later = from_main(settings)
            self._serving.follower.then(partial(self._serving.apply, later))
            return
        try:
            loaded = from_main(settings)
            this = Incarnation(number, incarnation, loaded.workers.processes)
            self._serving = Serving(loaded, this, self._link, self._reactor, self._log)
        except BaseException:
            self.stop()  # the main process starts another one after a pause
            raise

    def _commit(self) -> None:
        if self._serving is not None:
            self._serving.follower.then(self._serving.follower.commit)

    def _withdraw(self, name: str) -> None:
        if self._serving is not None:
            self._serving.follower.then(partial(self._serving.follower.withdraw, name))

    def _live(self) -> None:
        if self._serving is not None:
            self._serving.follower.then(self._listen)

    def _listen(self) -> None:
        if self._serving is not None and not self._is_ending:
            self._serving.listen()
            self._link.send("serving")

    def _accept(self, numbers: Sequence[int]) -> None:
        if self._serving is not None and not self._is_ending:
            self._serving.accept_from(numbers)

    def _stopping(self) -> None:
        if self._serving is not None:
            self._serving.stop_resp()

    def _stop_serving(self) -> Deferred[object]:
        serving = self._serving
        return maybeDeferred(lambda: None) if serving is None else serving.stop()


class Serving:
    """The half of the service that serves, on the inherited sockets."""

    def __init__(self, settings: Settings, incarnation: Incarnation, link: Link, reactor: Reactor, log: Log) -> None:
        self._number = incarnation.number
        self._count = settings.workers.processes
        self._adopted: list[AdoptedPort] = []
        self.cache = Cache(settings.datasets.values(), reactor.seconds)
        self.follower = Follower(self.cache, link, Drain(reactor).add, Clocks(reactor), reactor, log)
        stalls = StallWatch(reactor)
        limits = settings.limits
        held = HeldSnapshots(self.cache, reactor, log, limits.max_old_generations, limits.max_answer_s)
        metrics = Metrics(self.cache, stalls.lateness, reactor, held.superseded)
        self._reactor = reactor
        part = Part(incarnation, inherited_connections(), self.cache, link)
        shared = Shared(self.cache, part.main, metrics, held, reactor, log, part)
        self._ports = Ports(settings, shared, self._adopt)
        self._ports.add_resp()
        self._ports.add_http()
        self._listening: list[PortService] = []
        counts = CountsService(self.cache, part, stalls.lateness, held.superseded, link, reactor)
        self._others: list[Service] = [stalls, counts]
        for service in self._others:
            service.startService()
        # As in the main process: the first full collection over the imported modules would take 40 ms.
        gc.collect()
        gc.freeze()

    def listen(self) -> None:
        """Begin to accept clients."""
        for service in self._ports.services():
            service.privilegedStartService()
            service.startService()
            self._listening.append(service)

    def accept_from(self, numbers: Sequence[int]) -> None:
        """Accept clients from the sockets of the workers with these numbers."""
        for port in self._adopted:
            port.accept_from(numbers)

    def apply(self, settings: Settings) -> None:
        """Apply a changed configuration."""
        self.cache.declare(settings.datasets.values())
        self._ports.apply(settings)

    def stop_resp(self) -> None:
        """Close the RESP port, and report that the service is stopping."""
        self.cache.stop()
        for service in [each for each in self._listening if each.name == "resp"]:
            self._listening.remove(service)
            service.stopService()

    def stop(self) -> Deferred[object]:
        """Close everything."""
        self.cache.stop()
        self.follower.stop()
        parts = MultiService()
        for service in (*self._others, *self._listening):
            service.setServiceParent(parts)
        return maybeDeferred(parts.stopService)

    def _adopt(
        self, name: str, host: str, port: int, factory: ServerFactory, most_accepted: int
    ) -> Callable[[], IListeningPort]:
        def listen() -> IListeningPort:
            sockets = {number: descriptors.of_port(name, number) for number in range(1, self._count + 1)}
            adopted = AdoptedPort(self._reactor, sockets, factory, most_accepted)
            adopted.accept_from([self._number])
            adopted.startListening()
            self._adopted.append(adopted)
            return adopted  # type: ignore[return-value]  # it implements the zope.interface

        return listen
