"""A model of a large fleet in virtual time: its load on PostgreSQL and on the Valkey, while they fail and come back.

    python -m benchmarks.fleet_model [--processes 1000] [--seed 1] [--plots DIR]

Each process of the model is a loop that decides whether it competes for leads, one for its lead session, one for its
unit, and a refresher, with the decisions and the parameters of the service itself: those of `Competition`,
`LeadSettings`, `full_jitter`, `POLL_S`, `STRETCH`, `role_of` and `Retries`. The servers are simple: they answer or
refuse at once, and one process has the lead. The model counts attempts to connect and queries in each second of the
virtual time. Beside it runs the same without jitter, backoff and deputy: each delay is the shortest that there is after
a first failure, and each process competes for the lead.
"""

from __future__ import annotations

import argparse
import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks import plots
from cacheservice.base.backoff import full_jitter
from cacheservice.config import DatasetSettings
from cacheservice.refresh.retries import Retries
from cacheservice.replication import competition, unit
from cacheservice.replication.roles import Facts, Role, role_of
from cacheservice.replication.valkey.deputy import DEPUTY_S
from cacheservice.sources.postgres.leads import LeadSettings

FALLBACK_AFTER_S = 60.0
INTERVAL_S = 30.0
LEAST_RETRY_S, MOST_RETRY_S = 0.2, 5.0  # of replication/unit.py
END_S = 400
DATABASE_DOWN_S = (60.0, 120.0)
VALKEY_DOWN_S = (160.0, 280.0)
RESTART_AT_S = 340.0
COUNTED = ("PostgreSQL: connections", "PostgreSQL: queries", "Valkey: connections", "Valkey: queries")


class VirtualTime:
    """A clock that jumps from one call to the next. That of Twisted sorts all calls for each new one."""

    def __init__(self) -> None:
        self._now = 0.0
        self._calls: list[tuple[float, int, Callable[[], object]]] = []
        self._made = 0

    def seconds(self) -> float:
        return self._now

    def call_later(self, seconds: float, what: Callable[[], object]) -> None:
        self._made += 1
        heapq.heappush(self._calls, (self._now + seconds, self._made, what))

    def run_until(self, end: float) -> None:
        """Make all calls that are due before a moment, in order."""
        while self._calls and self._calls[0][0] < end:
            self._now, _, what = heapq.heappop(self._calls)
            what()


@dataclass
class World:
    """The servers, and what they have counted.

    :param has_jitter: whether delays are random and grow.
    """

    seed: int
    has_jitter: bool
    clock: VirtualTime = field(default_factory=VirtualTime)
    counts: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in COUNTED})
    leader: Process | None = None
    deputy: Process | None = None
    deputy_until: float = 0.0
    published_at: float = 0.0

    def __post_init__(self) -> None:
        self._random = Random(self.seed)

    def random(self) -> float:
        """Return the share of a delay's bound that is waited."""
        return self._random.random() if self.has_jitter else 1.0

    def count(self, name: str) -> None:
        self.counts[name][int(self.clock.seconds())] += 1

    def has_database(self) -> bool:
        return not DATABASE_DOWN_S[0] <= self.clock.seconds() < DATABASE_DOWN_S[1]

    def has_valkey(self) -> bool:
        return not VALKEY_DOWN_S[0] <= self.clock.seconds() < VALKEY_DOWN_S[1]

    def backoff(self, least_s: float, most_s: float) -> Callable[[int], float]:
        """Return the delay by the number of failures before: that of the service, or always the shortest."""
        return full_jitter(least_s, most_s, self.random) if self.has_jitter else lambda failures: least_s


class Process:
    """One process. `start` begins it again, as a restart does."""

    def __init__(self, world: World, phase: float) -> None:
        self._world = world
        self._phase = phase
        self._life = 0
        self._leads = LeadSettings("model", random=world.random)
        self._settings = DatasetSettings(name="products", query="SELECT 1", key="id", interval_s=INTERVAL_S)

    def start(self) -> None:
        """Begin, with no session, no connection and no role; at another moment of a second than the others."""
        world = self._world
        if world.leader is self:
            world.leader = None
        self._life += 1
        self._role, self._heard_at = Role.FOLLOWING, world.clock.seconds()
        self._has_session = self._has_connection = self._competes = False
        self._able_at = self._away_until = 0.0
        self._joins_at: float | None = None
        self._lead_failures = self._unit_failures = self._refresh_failures = 0
        self._lead_delay_s = world.backoff(self._leads.retry_initial_s, self._leads.retry_max_s)
        self._unit_delay_s = world.backoff(LEAST_RETRY_S, MOST_RETRY_S)
        self._retries = Retries(world.random)
        self._retries.take(self._settings)
        self._turn = 0
        self._later(self._phase, self._decide)
        self._later(self._phase, self._look)

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        life = self._life
        self._world.clock.call_later(seconds, lambda: what() if self._life == life else None)

    def _decide(self) -> None:
        """A look at who is the deputy, and the decision whether to compete for the lead."""
        world, now = self._world, self._world.clock.seconds()
        leads = world.leader is self
        competes = self._competes
        if world.has_valkey():
            world.count("Valkey: queries")
            is_deputy = world.deputy is self and now < world.deputy_until
            if not is_deputy or self._has_session:
                self._able_at = now
            elif now - self._able_at > competition.PATIENCE_S:
                self._away_until = now + competition.away_s(world.random)
            if leads or now < self._away_until:
                if is_deputy:
                    world.deputy = None
            elif is_deputy or world.deputy is None or now >= world.deputy_until:
                world.deputy, world.deputy_until = self, now + DEPUTY_S
            competes = world.deputy is self
        if now - self._heard_at < FALLBACK_AFTER_S:
            self._joins_at = None
        elif self._joins_at is None:
            self._joins_at = now + competition.SPREAD_S * world.random()
        joins = self._joins_at is not None and now >= self._joins_at
        competes = competes or leads or joins or not world.has_jitter
        if competes and not self._competes:
            self._later(0.0, self._compete)
        self._competes = competes
        self._later(competition.POLL_S, self._decide)

    def _compete(self) -> None:
        """A heartbeat of the lead session, or an attempt to open one."""
        world = self._world
        if not self._competes:
            self._has_session, self._lead_failures = False, 0
            return
        if not self._has_session:
            world.count("PostgreSQL: connections")
        if not world.has_database():
            self._has_session = False
            if world.leader is self:
                world.leader = None
            self._lead_failures += 1
            self._later(self._lead_delay_s(self._lead_failures - 1), self._compete)
            return
        self._has_session, self._lead_failures = True, 0
        world.count("PostgreSQL: queries")
        world.leader = world.leader or self
        self._later(self._leads.heartbeat_s, self._compete)

    def _look(self) -> None:
        """A look at the Valkey, and the decision about the role."""
        world, now = self._world, self._world.clock.seconds()
        if not self._has_connection:
            world.count("Valkey: connections")
        self._has_connection = world.has_valkey()
        if self._has_connection:
            world.count("Valkey: queries")
            self._unit_failures = 0
            if now - world.published_at <= INTERVAL_S + self._settings.timeout_s:
                self._heard_at = now
        else:
            self._unit_failures += 1
        facts = Facts(world.leader is self, now - self._heard_at, self._has_session)
        role = role_of(facts, self._role, FALLBACK_AFTER_S)
        if role is not self._role:
            self._role = role
            self._turn += 1
            if role is not Role.FOLLOWING:
                first_s = INTERVAL_S * world.random() if role is Role.ALONE and world.has_jitter else 0.0
                self._later(first_s, self._refresher(self._turn))
        wait_s = unit.POLL_S
        if self._unit_failures:
            wait_s = self._unit_delay_s(self._unit_failures - 1)
            wait_s = max(unit.POLL_S / 4, wait_s) if world.has_jitter else wait_s
        self._later(wait_s, self._look)

    def _refresher(self, turn: int) -> Callable[[], None]:
        """Return the refresh of a turn, which plans the next one."""

        def refresh() -> None:
            world, now = self._world, self._world.clock.seconds()
            if self._turn != turn:
                return
            interval_s = INTERVAL_S * (unit.STRETCH if self._role is Role.ALONE and world.has_jitter else 1.0)
            world.count("PostgreSQL: connections")
            if world.has_database():
                world.count("PostgreSQL: queries")
                self._refresh_failures = 0
                if self._role is Role.LEADING and world.has_valkey():
                    world.published_at = now
                self._later(interval_s, refresh)
                return
            self._retries.forget()
            self._retries.failed(now, self._refresh_failures if world.has_jitter else 0, now + interval_s)
            self._refresh_failures += 1
            self._later(min(self._retries.at - now, interval_s), refresh)

        return refresh


def run(processes: int, seed: int, *, has_jitter: bool) -> dict[str, list[int]]:
    """Return the events of each second, by name."""
    world = World(seed, has_jitter)
    phases = Random(seed + 1)
    fleet = [Process(world, phases.random()) for _ in range(processes)]
    for process in fleet:
        process.start()
    world.clock.call_later(RESTART_AT_S, lambda: [process.start() for process in fleet])
    world.clock.run_until(END_S)
    return {name: [counter[second] for second in range(END_S)] for name, counter in world.counts.items()}


def peak(counts: Sequence[int], begin: float, end: float) -> int:
    """Return the most events of a second within a time."""
    return max(counts[int(begin) : int(end)])


PHASES = {
    "database down, and back": (DATABASE_DOWN_S[0], VALKEY_DOWN_S[0]),
    "Valkey down, and back": (VALKEY_DOWN_S[0], RESTART_AT_S),
    "mass restart": (RESTART_AT_S, float(END_S)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plots", type=Path)
    options = parser.parse_args()
    real = run(options.processes, options.seed, has_jitter=True)
    plain = run(options.processes, options.seed, has_jitter=False)
    for phase, (begin, end) in PHASES.items():
        for name in COUNTED:
            print(f"{phase}: {name}: at most {peak(real[name], begin, end):,} a second, ", end="")
            print(f"without jitter, backoff and deputy {peak(plain[name], begin, end):,}", flush=True)
    if options.plots is not None:
        plots.load(options.plots / "fleet-load.svg", real, plain)


if __name__ == "__main__":
    main()
