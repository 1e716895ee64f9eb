"""One worker, as the main process sees it: its process, its link, and its restarts."""

from __future__ import annotations

import enum
import socket
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from twisted.internet.defer import Deferred

from cacheservice.app.workers.heartbeat import Heartbeat
from cacheservice.app.workers.spawn import Ending, Process, Spawn
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.base.timers import Alarm
from cacheservice.cache.workers import WorkerState
from cacheservice.replication.link import Link
from cacheservice.replication.messages import Plain
from cacheservice.replication.sockets import adopt

_LEVELS = frozenset({"debug", "info", "warning", "error"})


class State(enum.Enum):
    """The states of a worker.

    - STOPPED: it was not started yet, or the service has stopped it.
    - STARTING: its process runs, and has not asked for its settings yet.
    - FILLING: it has its settings, and gets the snapshots.
    - SERVING: it accepts clients.
    - ENDING: it was asked to stop, does not answer, or its link is lost. Its process still runs.
    - WAITING: its process has ended, and the next one starts after a pause.
    """

    STOPPED = enum.auto()
    STARTING = enum.auto()
    FILLING = enum.auto()
    SERVING = enum.auto()
    ENDING = enum.auto()
    WAITING = enum.auto()

    @property
    def shown(self) -> WorkerState:
        """The state as operators see it."""
        if self is State.SERVING:
            return "serving"
        return "starting" if self in (State.STARTING, State.FILLING) else "down"


class Timing(NamedTuple):
    """Limits of time, in seconds.

    :param ping_interval_s: from one ping to the next.
    :param hung_after_s: without an answer to a ping, after which a worker is killed.
    :param start_limit_s: from the start of a process to its first message, after which it is killed.
    :param stop_limit_s: for a worker to stop by itself.
    :param proven_after_s: after which a worker that ends has not failed to start, so that the pause before the next
        restart is short again.
    """

    ping_interval_s: float = 1.0
    hung_after_s: float = 10.0
    start_limit_s: float = 60.0
    stop_limit_s: float = 3.0
    proven_after_s: float = 60.0


class Feed(Protocol):
    """Sends the snapshots to one worker, then `live`, then what changes."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Surroundings(NamedTuple):
    """The objects that all workers share.

    :param spawn: starts a process.
    :param attach: adds the handlers of a new link, and returns its feed, not started. It gets the number of the worker.
    :param pause_s: returns the pause before a restart, by the number of failures before.
    """

    spawn: Spawn
    attach: Callable[[int, Link], Feed]
    pause_s: Callable[[int], float]
    timing: Timing
    reactor: Reactor
    log: Log


class Team(Protocol):
    """All workers."""

    def settings(self) -> Mapping[str, Plain]:
        """Return the settings as they are in effect now, as plain values."""

    def changed(self) -> None:
        """Note that a worker began or ceased to accept clients."""


class Member:
    """Runs one worker until it is stopped, and starts it again if it ends.

    :param number: from 1.
    """

    def __init__(self, number: int, team: Team, surroundings: Surroundings) -> None:
        self.number = number
        self.state = State.STOPPED
        self.starts = 0
        self._team = team
        self._answers = True
        self._surroundings = surroundings
        self._log = surroundings.log.bind(worker=number)
        self._process: Process | None = None
        self._link: Link | None = None
        self._feed: Feed | None = None
        self._heartbeat: Heartbeat | None = None
        self._alarm = Alarm(surroundings.reactor)
        self._started_at = 0.0
        self._failures = 0
        self._stopped: Deferred[None] | None = None

    @property
    def pid(self) -> int | None:
        """The ID of its process; None if there is none."""
        return None if self._process is None else self._process.pid

    @property
    def restarts(self) -> int:
        """The number of processes after the first."""
        return max(0, self.starts - 1)

    @property
    def link(self) -> Link | None:
        """The link to a worker that has its settings; None for any other."""
        return self._link if self.state in (State.FILLING, State.SERVING) else None

    @property
    def accepts(self) -> bool:
        """Whether it accepts clients now."""
        return self.state is State.SERVING and self._answers

    def send(self, name: str, **fields: Plain) -> None:
        """Send an event, if it has its settings."""
        if (link := self.link) is not None:
            link.send(name, **fields)

    def answering(self, answers: bool) -> None:
        """Note that it does not answer any more, or does again."""
        self._answers = answers
        self._team.changed()

    def start(self) -> None:
        """Start a process."""
        around = self._surroundings
        link: Link = Link(around.reactor, self._log, on_lost=lambda _: self._link_lost(link))
        self._link = link
        for name, handler in (("hello", self._hello), ("serving", self._serving), ("log", self._logged)):
            link.handle(name, handler)
        self._feed = around.attach(self.number, link)
        try:
            self._process, ours = _spawned(around.spawn, self._ended)
        except OSError as error:
            # No process, no memory or no descriptor is left: the next attempt may succeed.
            self._log.error("worker_not_started", error=str(error))
            self._restart()
            return
        self.starts += 1
        self.state, self._started_at, self._answers = State.STARTING, around.reactor.seconds(), True
        self._alarm.set(around.timing.start_limit_s, self.hung)
        adopt(around.reactor, ours, link)
        self._log.info("worker_started", pid=self.pid)

    def stop(self) -> Deferred[None]:
        """Have the worker stop, and kill it if it does not. The Deferred fires when its process has ended."""
        stopped: Deferred[None] = Deferred()
        self._stopped = stopped
        if self._process is None:
            self._alarm.clear()
            self._end()
            return stopped
        if self._link is not None:
            self._link.send("stop")
        self._await_end()
        return stopped

    def _hello(self) -> None:
        """Send everything to a process that has started."""
        assert self._link is not None
        if self.state is not State.STARTING:
            return
        self._alarm.clear()
        self.state = State.FILLING
        self._link.send("settings", settings=self._team.settings(), number=self.number, incarnation=self.starts)
        timing = self._surroundings.timing
        self._heartbeat = Heartbeat(
            self._link,
            self._surroundings.reactor,
            timing.ping_interval_s,
            max(1, round(timing.hung_after_s / timing.ping_interval_s)),
            self,
        )
        self._heartbeat.start()
        if self._feed is not None:
            self._feed.start()

    def _serving(self) -> None:
        if self.state is State.FILLING:
            self.state = State.SERVING
            seconds = round(self._surroundings.reactor.seconds() - self._started_at, 3)
            self._log.info("worker_serving", pid=self.pid, after_s=seconds)
            self._team.changed()

    def _logged(self, level: str, event: str, fields: Mapping[str, object]) -> None:
        log = getattr(self._log, level if level in _LEVELS else "error")
        log(event, **{name: value for name, value in fields.items() if name not in ("event", "worker")})

    def hung(self) -> None:
        self._log.error("worker_hung", pid=self.pid, state=self.state.name.lower())
        self._await_end()
        self._kill()

    def _link_lost(self, link: Link) -> None:
        """Wait for the end of the process, which comes at the same time unless it is in trouble."""
        if link is not self._link:
            return  # of a process that has ended
        self._link = None
        self._quieten()
        if self._process is not None:
            self._await_end()

    def _await_end(self) -> None:
        if self.state is not State.ENDING:
            self.state = State.ENDING
            self._quieten()
            self._team.changed()
            self._alarm.set(self._surroundings.timing.stop_limit_s, self._kill)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _ended(self, ending: Ending) -> None:
        """Note the end of the process."""
        pid, self._process = self.pid, None
        self._alarm.clear()
        self._quieten()
        link, self._link = self._link, None
        if link is not None:
            link.finish()
        wanted = self._stopped is not None
        log = self._log.info if wanted and ending.exit_code == 0 else self._log.warning
        log("worker_ended", pid=pid, exit_code=ending.exit_code, signal=ending.signal)
        if wanted:
            self._end()
            return
        lived_s = self._surroundings.reactor.seconds() - self._started_at
        if lived_s >= self._surroundings.timing.proven_after_s:
            self._failures = 0
        self._restart()

    def _restart(self) -> None:
        pause_s = self._surroundings.pause_s(self._failures)
        self._failures += 1
        self.state = State.WAITING
        self._team.changed()
        self._log.info("worker_restarting", in_s=round(pause_s, 3))
        self._alarm.set(pause_s, self.start)

    def _end(self) -> None:
        self.state = State.STOPPED
        if self._stopped is not None and not self._stopped.called:
            self._stopped.callback(None)

    def _quieten(self) -> None:
        """Send nothing more."""
        feed, self._feed = self._feed, None
        if feed is not None:
            feed.stop()
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            heartbeat.stop()


def _spawned(spawn: Spawn, ended: Callable[[Ending], None]) -> tuple[Process, socket.socket]:
    """Start a process, and return it with this end of its link.

    :raises OSError: if the system has no room for it.
    """
    ours, theirs = socket.socketpair()
    try:
        return spawn(theirs, ended), ours
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
