"""What is done to servers and services."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random

import psycopg2

from benchmarks.jepsen.cluster import Cluster
from benchmarks.jepsen.judge import Judge
from benchmarks.jepsen.money import RECOVERY_LIMIT_S, TABLES
from benchmarks.jepsen.service import Service


class Faults:
    """What is done to servers and services, in random order."""

    def __init__(self, cluster: Cluster, services: Sequence[Service], judge: Judge, seed: str) -> None:
        self._cluster, self._services, self._judge = cluster, services, judge
        self._choose = Random(f"{seed} faults")
        self.struck: Counter[str] = Counter()
        self.longest_s: dict[str, float] = {}
        self._all: dict[str, Callable[[], None]] = {
            "sessions ended": self.end_sessions,
            "one session ended, often": self.end_one_session,
            "full reads asked for": self.refresh,
            "primary restarted": self.restart_primary,
            "standby restarted": self.restart_standby,
            "primary frozen": self.freeze_primary,
            "standby frozen": self.freeze_standby,
            "replay paused": self.pause_replay,
            "service killed": lambda: self.end_service(signal.SIGKILL),
            "service stopped": lambda: self.end_service(signal.SIGTERM),
            "table rewritten": self.rewrite,
            "promotion": self._cluster.promote,
        }

    @property
    def names(self) -> list[str]:
        return list(self._all)

    def run_until(self, ends_at: float) -> None:
        left: list[str] = []
        while time.monotonic() < ends_at:
            if not left:
                left = self._choose.sample(list(self._all), len(self._all))
            name = left.pop()
            self.strike(name)
            time.sleep(self._choose.uniform(0, 3))

    def strike(self, name: str) -> None:
        began_at = time.monotonic()
        self._all[name]()
        ended_at = time.monotonic()
        while not all(service.fresh(time.monotonic() - ended_at) for service in self._services):
            if time.monotonic() > ended_at + RECOVERY_LIMIT_S:
                told = [service.ask("status") for service in self._services]
                self._judge.found("recoveries that did not come", "\n".join([f"after {name}:", *told]))
                break
            time.sleep(0.1)
        took_s = time.monotonic() - began_at
        self.struck[name] += 1
        self.longest_s[name] = max(took_s, self.longest_s.get(name, 0))
        self._judge.judge_ages()
        print(f"{time.strftime('%H:%M:%S')} {name}: fresh after {took_s:.1f} s", flush=True)

    def end_sessions(self) -> None:
        for _ in range(5):
            self.terminate("")
            time.sleep(self._choose.uniform(0, 0.3))

    def end_one_session(self) -> None:
        for _ in range(30):
            self.terminate("ORDER BY random() LIMIT 1")
            time.sleep(self._choose.uniform(0, 0.2))

    def terminate(self, which: str) -> None:
        """End sessions of the services that are at work."""
        for node in (self._cluster.primary, self._cluster.standby):
            with suppress(psycopg2.Error):
                node.sql(
                    "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity WHERE "
                    f"application_name LIKE 'cacheservice%' AND (state = 'active' OR random() < 0.2) {which}) AS s",
                )

    def refresh(self) -> None:
        for _ in range(10):
            for service in self._services:
                service.order(f"refresh {self._choose.choice(TABLES)}")
            time.sleep(self._choose.uniform(0, 0.3))

    def restart_primary(self) -> None:
        self._cluster.primary.stop(self._choose.choice([signal.SIGQUIT, signal.SIGINT]))
        time.sleep(self._choose.uniform(0, 2))
        self._cluster.primary.start()

    def restart_standby(self) -> None:
        self._cluster.standby.stop(self._choose.choice([signal.SIGQUIT, signal.SIGINT]))
        time.sleep(self._choose.uniform(0, 2))
        self._cluster.standby.start()

    def freeze_primary(self) -> None:
        self._cluster.primary.freeze()
        time.sleep(self._choose.uniform(1, 8))
        self._cluster.primary.thaw()

    def freeze_standby(self) -> None:
        self._cluster.standby.freeze()
        time.sleep(self._choose.uniform(1, 8))
        self._cluster.standby.thaw()

    def pause_replay(self) -> None:
        self._cluster.standby.sql("SELECT pg_wal_replay_pause()")
        time.sleep(self._choose.uniform(2, 10))
        self._cluster.standby.sql("SELECT pg_wal_replay_resume()")

    def end_service(self, number: signal.Signals) -> None:
        service = self._choose.choice(self._services)
        service.stop(number)
        service.start()

    def rewrite(self) -> None:
        with suppress(psycopg2.Error):
            self._cluster.primary.sql(f"VACUUM FULL {self._choose.choice(TABLES)}")
