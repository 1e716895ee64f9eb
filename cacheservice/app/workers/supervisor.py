"""Runs the workers: starts them, ends those that hang, restarts those that ended, and stops all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList

from cacheservice.app.effective import effective
from cacheservice.app.workers.member import Member, Surroundings
from cacheservice.base import scheduling
from cacheservice.config import Settings, for_workers
from cacheservice.replication.messages import Plain


class Supervisor(Service):
    """Runs as many workers as the configuration has.

    :param started: the settings with which the service was started.
    """

    name = "workers"

    def __init__(self, started: Settings, surroundings: Surroundings) -> None:
        self._started = started
        self._plain: Mapping[str, Plain] = for_workers(started)
        self._reactor = surroundings.reactor
        self.members: Sequence[Member] = tuple(
            Member(number, self, surroundings) for number in range(1, started.workers.processes + 1)
        )

    def settings(self) -> Mapping[str, Plain]:
        """Return the settings as they are in effect now, as plain values; they contain the secrets of clients."""
        return self._plain

    def apply(self, settings: Settings) -> None:
        """Send a changed configuration to all workers, without the changes that need a restart."""
        self._plain = for_workers(effective(self._started, settings))
        for member in self.members:
            member.send("settings", settings=self._plain)

    def changed(self) -> None:
        """Divide the sockets: each worker accepts from its own, and from those of workers that do not accept."""
        if self.running:
            others = [member.number for member in self.members if not member.accepts]
            for member in self.members:
                member.send("accept", numbers=sorted({member.number, *others}))

    def startService(self) -> None:
        super().startService()
        # The reactor learns of the ends of processes once it runs.
        self._reactor.callWhenRunning(self._start_all)

    def stop_resp(self) -> None:
        """Have all workers close their RESP ports: the service is stopping."""
        for member in self.members:
            member.send("stopping")

    def stopService(self) -> Deferred[Any]:
        """Stop all workers. The Deferred fires when all their processes have ended."""
        super().stopService()
        return DeferredList([member.stop() for member in self.members])

    def _start_all(self) -> None:
        if self.running:
            # The workers have short ones, so that a refresh does not keep them from their clients.
            scheduling.ask_for_slices(scheduling.LONGEST_S)
            for member in self.members:
                member.start()
