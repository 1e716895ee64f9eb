"""Faults of every kind around the real service, while readers on every port check each answer.

`Storm` holds it all: writers that change tables whose contents at any moment are known (`Ledger`), the
faulty network in a process of its own, the service under twistd with its snapshots on a small file system, readers in
threads, and the faults (`FAULTS`). `python -m tests.kit.faults PORT` is that network: it prints its own port, takes one
order a line on standard input (`silence 1000`, `heal`), prints `ok` after each, and ends with its standard input.

What a reader receives is right if

- all rows of an answer, and of all datasets of a group in one MULTI, are of one version and complete, and each row's
  `mark` is that of its number and version (else the answer is *mixed*);
- the version is the newest that the snapshot of the database saw with which the rows were read: the rows name that
  snapshot, the writer knows its transactions;
- and the rows are of the as_of that the port reports: they hold it themselves, every version whose COMMIT had returned
  before it is in them, and none whose COMMIT began after the rows were read. The snapshot is taken just after as_of, by
  an unknown time if the server is frozen in between: that is why the second bound is when the rows were read (else the
  answer is *wrong*).
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import hiredis
import psycopg2
from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from cacheservice.cache.cache import Cache
from cacheservice.cache.snapshot import Snapshot
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import PersistenceSettings
from cacheservice.refresh.restore import restore
from cacheservice.sources.disk.store import SnapshotStore
from tests.kit import status
from tests.kit.clock_shim import COMPILER, ClockShim
from tests.kit.daemon import STOP_LIMIT_S, Daemon
from tests.kit.datasets import rows_builder
from tests.kit.faulty_network import Network
from tests.kit.persistence_child import SETTINGS, killed_after
from tests.kit.postgres import connect, query, sessions
from tests.kit.resp import encode
from tests.kit.saved_files import rows_of_generation
from tests.kit.waiting import GIVE_UP_S, wait_until

RECOVERY_LIMIT_S = 5.0
"""After the interval that follows the end of a fault."""
READ_LIMIT_S = 30.0
"""Longer than the service is ever stopped."""
SETTLE_S = 2.0
WARM_S = 2.0
DISK_BYTES = 12 * 1024 * 1024
MOST_GROWTH_BYTES = 16 * 1024 * 1024
HOUR_S = 3600

TABLES = MappingProxyType({"alone": 200, "debits": 120, "credits": 120, "large": 20_000})
"""Their rows, to which each version adds up to six."""
LEDGERS = MappingProxyType({"alone": ("alone",), "books": ("debits", "credits"), "large": ("large",)})
BOOKS = LEDGERS["books"]
LEDGER_OF = MappingProxyType({table: ledger for ledger, tables in LEDGERS.items() for table in tables})
QUERY = """
    SELECT id, v, mark, (extract(epoch FROM now()) * 1000000)::bigint AS as_of_us,
           (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS read_on_us, pg_current_snapshot()::text AS seen
    FROM {table}
"""

MUST_BE_0 = MappingProxyType(
    {
        "wrong": "answers wrong",
        "mixed": "answers mixed",
        "failed": "reads failed while a snapshot existed",
        "back": "generations or as_of going back",
        "young": "ages understated",
        "lost": "saved generations not restored",
        "damage": "damaged files served, or left in their place",
        "killed": "starts after a kill that loaded neither the old nor the new generation, or a mix",
        "ended": "ends of the process by itself",
        "stop": f"stops not clean, or later than {STOP_LIMIT_S:g} s",
        "broken": "internal errors in the log",
        "late": f"recoveries later than the interval + {RECOVERY_LIMIT_S:g} s",
        "grown": "lives with more descriptors, threads or memory at their end",
        "left": "sessions and temporary files left at the end",
        "fleet": "laws of the fleet broken",
    }
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CLOCK_US = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
_EXAMPLES = 5
_MARK_MODULUS = 2**31


class Counts:
    """How often what happened, and the first examples of what should not."""

    def __init__(self) -> None:
        self.examples: dict[str, list[str]] = {}
        self._counter: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __getitem__(self, what: str) -> int:
        return self._counter[what]

    def add(self, what: str, example: str = "", count: int = 1) -> None:
        with self._lock:
            self._counter[what] += count
            some = self.examples.setdefault(what, [])
            if example and len(some) < _EXAMPLES:
                some.append(example)

    def bad(self) -> dict[str, tuple[int, list[str]]]:
        """Of what must be 0, what is not."""
        return {what: (self[what], self.examples[what]) for what in MUST_BE_0 if self[what]}


# What the database holds


def row_count(table: str, version: int) -> int:
    return TABLES[table] + version % 7


def mark(number: int, version: int) -> int:
    return (number * 1_000_003 + version * 7_919) % _MARK_MODULUS


@dataclass(slots=True)
class Version:
    """One committed state of a ledger's tables; times by the database's clock, in microseconds since 1970.

    `begun_us` is just before its COMMIT; `ended_us` after that returned, None as long as it has not.
    """

    number: int
    xid: int
    begun_us: int
    ended_us: int | None = None


class Claim(NamedTuple):
    """What an answer states about itself; `generation` is 0 if the port does not report it."""

    life: int
    dataset: str
    generation: int
    version: int
    seen: str
    as_of_us: int
    read_on_us: int


class Ledger:
    """Tables that one writer changes together, a version in each transaction, in a thread from `start` to `stop`.

    :param pause_s: between two versions.
    """

    def __init__(self, server: EmbeddedPostgres, database: str, name: str, pause_s: float) -> None:
        self.name = name
        self.tables = LEDGERS[name]
        self.versions: list[Version] = []
        self._server = server
        self._database = database
        self._pause_s = pause_s
        self._orders: deque[str] = deque()
        self._emptied = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def create(self) -> None:
        for table in self.tables:
            query(self._server, self._database, f"CREATE TABLE {table} (id int PRIMARY KEY, v int, mark bigint)")
        with closing(connect(self._server, self._database)) as connection:
            self._write(connection, "")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The server must answer by now."""
        self._stop.set()
        self._thread.join(GIVE_UP_S)
        assert not self._thread.is_alive(), f"the writer of {self.name} hangs"

    def order(self, what: str) -> None:
        """Of the writer's next version: `truncate` fills the tables again, `empty` leaves them empty until `fill`."""
        self._orders.append(what)

    def problem(self, claim: Claim) -> str | None:
        """What is wrong with a claim by what this writer did, if something is; asked when nothing is in doubt."""
        versions = self.versions
        lowest, highest, running = parsed(claim.seen)
        at = bisect_left(versions, highest, key=lambda version: version.xid) - 1
        while at >= 0 and versions[at].xid >= lowest and versions[at].xid in running:
            at -= 1
        truth = versions[at].number if at >= 0 else 0
        if claim.version != truth:
            return f"{claim}: the database held version {truth} then"
        sure = bisect_left(versions, claim.as_of_us, key=lambda version: version.ended_us) - 1
        if sure >= 0 and versions[sure].number > claim.version:
            return f"{claim}: version {versions[sure].number} was committed before its as_of"
        if not max(versions[at].begun_us, claim.as_of_us) <= claim.read_on_us:
            return f"{claim}: it was committed after it was read"
        return None

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with closing(connect(self._server, self._database)) as connection:
                    self._settle(connection)
                    while not self._stop.wait(self._pause_s):
                        if self._orders:
                            self._write(connection, self._orders.popleft())
                        elif not self._emptied:
                            self._write(connection, "")
                    return
            except psycopg2.Error:
                self._stop.wait(0.05)
        # Nothing is in doubt when this is read.
        with closing(connect(self._server, self._database)) as connection:
            self._settle(connection)

    def _write(self, connection: Any, order: str) -> None:
        number = self.versions[-1].number + 1 if self.versions else 1
        with closing(connection.cursor()) as cursor:
            cursor.execute("BEGIN")
            if order in ("truncate", "empty"):
                cursor.execute(f"TRUNCATE {', '.join(self.tables)}")
            for table in self.tables if order != "empty" else ():
                rows = row_count(table, number)
                cursor.execute(
                    f"INSERT INTO {table} SELECT id, %s, (id::bigint * 1000003 + %s * 7919) %% {_MARK_MODULUS} "
                    "FROM generate_series(1, %s) AS id "
                    "ON CONFLICT (id) DO UPDATE SET v = excluded.v, mark = excluded.mark",
                    (number, number, rows),
                )
                cursor.execute(f"DELETE FROM {table} WHERE id > %s", (rows,))
            cursor.execute(f"SELECT pg_current_xact_id()::text::bigint, {_CLOCK_US}")
            xid, begun_us = cursor.fetchone()
            # Known before it is visible to anybody.
            self.versions.append(Version(number, xid, begun_us))
            cursor.execute("COMMIT")
            cursor.execute(f"SELECT {_CLOCK_US}")
            (self.versions[-1].ended_us,) = cursor.fetchone()
        self._emptied = order == "empty"

    def _settle(self, connection: Any) -> None:
        """Learn what became of a COMMIT whose answer was lost."""
        if not self.versions or self.versions[-1].ended_us is not None:
            return
        last = self.versions[-1]
        with closing(connection.cursor()) as cursor:
            cursor.execute(f"SELECT (SELECT max(v) FROM {self.tables[0]}), pg_xact_status(%s::text::xid8)", (last.xid,))
            held, status = cursor.fetchone()
            if status == "committed" and held in (last.number, None):
                cursor.execute(f"SELECT {_CLOCK_US}")
                (last.ended_us,) = cursor.fetchone()
                self._emptied = held is None
            else:
                self.versions.pop()


def parsed(snapshot: str) -> tuple[int, int, set[int]]:
    """Of ``pg_current_snapshot()``: below what all are seen, from what on none, and those between that are not."""
    lowest, highest, running = snapshot.split(":")
    return int(lowest), int(highest), {int(xid) for xid in running.split(",") if xid}


# The service


@dataclass(frozen=True, slots=True)
class Health:
    """Of a process: its descriptors, threads and resident memory."""

    descriptors: int
    threads: int
    memory_bytes: int


def health(pid: int, during_s: float = SETTLE_S) -> Health:
    """The least of each over some time: a refresh and a save in between take more."""
    ends_at = time.monotonic() + during_s
    seen = []
    while time.monotonic() < ends_at:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        seen.append((descriptors, int(status["Threads"]), int(status["VmRSS"].split()[0]) * 1024))
        time.sleep(0.02)
    return Health(*map(min, zip(*seen, strict=True)))


def link_of(path: Path) -> str:
    """What a descriptor is, nothing if it has been closed by now."""
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""


class Life:
    """One process of the service, and its log until now.

    `ending` is set before it gets a signal to end: from then on what its readers meet is not its fault.
    """

    def __init__(self, number: int, directory: Path, configuration: str, **options: Any) -> None:
        directory.mkdir()
        self.number = number
        self.began_at = time.monotonic()
        self.daemon = Daemon(directory, configuration, **options)
        self.ending = False
        self.ports: dict[str, tuple[str, int]] = {}
        self.served: frozenset[str] = frozenset()
        self.restored: dict[str, int] = {}
        self.saved: dict[str, int] = {}
        self.saved_at: dict[str, float] = {}
        self.events: Counter[str] = Counter()
        self.broken: list[str] = []
        self.first: Health | None = None
        self.last: Health | None = None
        self.measured_again_at = 0.0
        self._highest: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._log = directory / "stdout"
        self._following = threading.Thread(target=self._follow, daemon=True)
        self._following.start()

    @property
    def pid(self) -> int:
        return self.daemon.process.pid

    def ask(self, line: str) -> str:
        return status.ask(self.ports["status"], line, READ_LIMIT_S)

    def datasets(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(self.ask("json"))["datasets"]
        return described

    def highest(self, name: str) -> int:
        """The greatest generation of a dataset that any reader has received."""
        return self._highest[name]

    def note_received(self, name: str, generation: int, at_least: int) -> bool:
        """Note a generation that a reader received; False if a greater one had been received before it asked."""
        with self._lock:
            self._highest[name] = max(self._highest[name], generation)
        return generation >= at_least

    def end(self, number: signal.Signals) -> float:
        """Seconds that it took to end."""
        self.ending = True
        began_at = time.monotonic()
        self.daemon.process.send_signal(number)
        try:
            self.daemon.process.wait(GIVE_UP_S)
        finally:
            self.daemon.kill()
            self._following.join(GIVE_UP_S)
        return time.monotonic() - began_at

    def _follow(self) -> None:
        rest = b""
        with self._log.open("rb") as log:
            while True:
                ended = self.daemon.process.poll() is not None
                *lines, rest = (rest + log.read()).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
                if ended:
                    return
                time.sleep(0.01)

    def _hear(self, line: dict[str, Any]) -> None:
        event, name = line["event"], line.get("dataset", "")
        self.events[event] += 1
        if event == "service_started":
            hosts = {port: line[port].rpartition(":") for port in ("status", "resp", "http")}
            self.ports = {port: (host, int(number)) for port, (host, _, number) in hosts.items()}
        elif event == "snapshot_restored":
            self.restored[name] = line["generation"]
            self.served |= {name}
        elif event == "refresh_published":
            self.served |= {name}
        elif event == "snapshot_saved":
            self.saved[name] = line["generation"]
            self.saved_at[name] = time.monotonic()
        if line["level"] in ("error", "critical") or "traceback" in line or "exception" in line:
            self.broken.append(json.dumps(line))


@dataclass(slots=True)
class Struck:
    """A fault that was, and how long after its end everything was fresh again; None if it never was."""

    name: str
    held_s: float
    recovery_s: float | None


@dataclass(slots=True)
class Storm:
    """The service, its database, its readers, and what is done to them; see `storm`.

    :param queries: in place of a dataset's own, to see that what they do wrong is found.
    :param before: of the command that starts the service.
    :param clock: turns the wall clock of the service; None without a compiler.
    """

    server: EmbeddedPostgres
    database: str
    directory: Path
    random: Random
    clock: ClockShim | None = None
    queries: Mapping[str, str] = field(default_factory=dict)
    before: Sequence[str] = ()
    interval_s: float = 1.0
    timeout_s: float = 3.0
    counts: Counts = field(default_factory=Counts)
    claims: Counter[Claim] = field(default_factory=Counter)
    described: dict[tuple[int, str, int], tuple[int, int]] = field(default_factory=dict)
    struck: list[Struck] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    last_saved: dict[str, int] = field(default_factory=dict)
    clock_offset_s: int = 0
    clock_turned_at: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)
    network: Any = None
    _readers: list[threading.Thread] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.Lock)

    @property
    def life(self) -> Life:
        return self.lives[-1]

    @property
    def saved(self) -> Path:
        return self.directory / "saved"

    def configuration(self, dsn: str) -> str:
        return (
            f'[postgres]\ndsn = "{dsn}"\nconnect_timeout_s = {self.timeout_s}\n'
            "[status]\nport = 0\n[resp]\nport = 0\n[http]\nport = 0\n"
            f'[admin]\nsocket = "{self.directory / "admin"}"\n'
            f'[persistence]\ndirectory = "{self.saved}"\nmin_save_interval_s = 0.2\n'
            f"[defaults]\ninterval_s = {self.interval_s}\ntimeout_s = {self.timeout_s}\nmax_age_s = 10\n"
            "retry_initial_s = 0.2\nretry_max_s = 1\n"
        ) + "".join(
            f"[datasets.{table}]\nquery = '''{self.queries.get(table) or QUERY.format(table=table)}'''\nkey = \"id\"\n"
            # The probe always changes, so that each attempt starts from the last snapshot and still reads everything.
            f"min_rows = {rows // 2}\nprobe = 'SELECT clock_timestamp()'\n"
            + ('group = "books"\n' if table in BOOKS else "")
            for table, rows in TABLES.items()
        )

    # Lives

    def start(self) -> None:
        """A new process of the service."""
        dsn = self.server.dsn(database=self.database, port=self.network.port)
        number = len(self.lives) + 1
        self.lives.append(
            Life(
                number,
                self.directory / f"life-{number}",
                self.configuration(dsn),
                environ=None if self.clock is None else self.clock.environ,
                before=self.before,
            )
        )

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the process, and look at what it left."""
        life = self.life
        if life.daemon.process.poll() is not None:
            self.counts.add("ended", f"life {life.number}: {life.daemon.process.returncode}, {life.daemon.errors}")
        took_s = life.end(number)
        if number == signal.SIGTERM:
            clean = life.events["service_stopped"] == 1 and life.daemon.process.returncode == -number
            if took_s > STOP_LIMIT_S or not clean:
                self.counts.add("stop", f"life {life.number}: {took_s:.1f} s, {life.daemon.process.returncode}")
        for line in life.broken:
            is_expected = self.before and "Too many open files" in line
            self.counts.add("lines of the log about descriptors" if is_expected else "broken", line)
        self.last_saved |= life.saved

    def measure(self) -> None:
        """Measure the process when its readers have been at work for some time, to compare its end with."""
        self.done.wait(WARM_S)
        self.life.first = health(self.life.pid)

    def measure_again(self) -> None:
        """At the end of a life that was measured."""
        life = self.life
        if life.first is None:
            return
        # A little later if it is more than at the start: a fault's sessions may be on their way out.
        give_up_at = time.monotonic() + 5 * SETTLE_S
        while self._grown(life.first, last := health(life.pid)) and time.monotonic() < give_up_at:
            pass
        life.last, life.measured_again_at = last, time.monotonic()
        if self._grown(life.first, last):
            open_files = [link for link in map(link_of, Path(f"/proc/{life.pid}/fd").iterdir()) if link]
            self.counts.add("grown", f"life {life.number}: {life.first} became {last}, {open_files}")

    def _grown(self, first: Health, last: Health) -> bool:
        # Twisted's pool has up to ten threads; it makes one when all are busy, and keeps it.
        return (
            last.descriptors > first.descriptors
            or last.threads > first.threads + 10
            or last.memory_bytes > first.memory_bytes + MOST_GROWTH_BYTES
        )

    def recovered(self, since: float, *, saved: bool = False, limit_s: float = GIVE_UP_S) -> float | None:
        """Wait until all that is served was read after `since` (seconds since 1970), and all of it saved, if asked;
        the seconds that it took since then."""
        life, since_us, since_at = self.life, since * 1e6, time.monotonic() - (time.time() - since)
        while (passed_s := time.time() - since) < limit_s:
            if life.daemon.process.poll() is not None:
                return None
            with suppress(OSError, ValueError):
                if (
                    life.ports
                    and all(
                        dataset["as_of"] is not None and microseconds(dataset["as_of"]) > since_us
                        for dataset in life.datasets().values()
                    )
                    and (not saved or all(life.saved_at.get(name, 0.0) > since_at for name in TABLES))
                ):
                    return passed_s
            time.sleep(0.05)
        return None

    def check_restored(self) -> None:
        """Whether what had been saved last is what the process began with."""
        life = self.life
        for name, generation in self.last_saved.items():
            if life.restored.get(name, 0) >= generation:
                continue
            if name in BOOKS and life.events["group_not_restored"]:
                self.counts.add("group not restored")
            else:
                self.counts.add("lost", f"life {life.number}: {name} {generation}, got {life.restored.get(name)}")

    # Faults

    def strike(self, name: str, hold_s: float, fault: Fault | None = None) -> Struck:
        """One fault of `FAULTS`, or another one, and the recovery from it."""
        if name in ENDING:
            self.measure_again()
        life, began_at = self.life, time.monotonic()
        with (fault or FAULTS[name])(self):
            self.done.wait(hold_s)
        ended_at, held_s = time.time(), time.monotonic() - began_at
        struck = Struck(name, held_s, self.recovered(ended_at, saved=name.startswith("disk")))
        self.struck.append(struck)
        if struck.recovery_s is None or struck.recovery_s > self.interval_s + RECOVERY_LIMIT_S:
            self.counts.add("late", f"{name} for {held_s:.1f} s: {struck.recovery_s} s")
        if self.life is not life and struck.recovery_s is not None:
            self.check_restored()
        return struck

    def turn_clock(self, offset_s: int) -> None:
        assert self.clock is not None, "there is no shim"
        self.clock.turn(offset_s)
        self.clock_offset_s, self.clock_turned_at = offset_s, time.monotonic()

    # Readers

    def start_readers(self) -> None:
        clients: list[Callable[[Storm, Life, Random], Client]] = [RespClient, RespClient, HttpClient, StatusClient]
        for client in clients:
            random = Random(self.random.random())
            thread = threading.Thread(target=keep_reading, args=(self, client, random), daemon=True)
            self._readers.append(thread)
            thread.start()

    def stop_readers(self) -> None:
        self.done.set()
        for thread in self._readers:
            thread.join(GIVE_UP_S)
            assert not thread.is_alive(), "a reader hangs"

    def examine(
        self, life: Life, name: str, documents: Iterable[bytes], generation: int = 0, **reported: Any
    ) -> Claim | None:
        """Look at the rows of one answer; what it claims, unless it contradicts itself.

        :param reported: `keys` and `as_of_us`, if the port reports them; `floor`, the generation that it must reach;
            `whole`, whether these are all rows.
        """
        rows = [json.loads(document) for document in documents]
        self.counts.add("answers")
        if not rows:
            self.counts.add("mixed", f"{name} {generation} has no rows")
            return None
        first = rows[0]
        same = {(row["v"], row["as_of_us"], row["seen"]) for row in rows}
        version = first["v"]
        if len(same) > 1:
            self.counts.add("mixed", f"{name} {generation}: {sorted(same)[:3]}")
            return None
        numbers = [row["id"] for row in rows]
        if reported.get("whole") and sorted(numbers) != list(range(1, row_count(name, version) + 1)):
            self.counts.add("mixed", f"{name} {generation}: {len(numbers)} rows of version {version}")
            return None
        if "keys" in reported and [int(key) for key in reported["keys"]] != numbers:
            self.counts.add("mixed", f"{name} {generation}: the keys are not those of the rows")
            return None
        if any(row["mark"] != mark(row["id"], version) for row in rows):
            self.counts.add("mixed", f"{name} {generation}: a mark is not that of version {version}")
            return None
        if reported.get("as_of_us", first["as_of_us"]) != first["as_of_us"]:
            self.counts.add(
                "wrong", f"{name} {generation}: reported {reported['as_of_us']}, the rows are of {first['as_of_us']}"
            )
        if generation and not life.note_received(name, generation, reported.get("floor", 0)):
            self.counts.add("back", f"{name}: {generation} after {reported['floor']}")
        read_on_us = min(row["read_on_us"] for row in rows)
        claim = Claim(life.number, name, generation, version, first["seen"], first["as_of_us"], read_on_us)
        with self._lock:
            self.claims[claim] += 1
        return claim

    def judge(self) -> None:
        """Compare all that readers received with what the database held, when the writers have ended."""
        known: dict[tuple[int, str], dict[int, Claim]] = {}
        for claim, count in self.claims.items():
            problem = self.ledgers[LEDGER_OF[claim.dataset]].problem(claim)
            if problem is not None:
                self.counts.add("wrong", problem, count)
            if claim.generation:
                before = known.setdefault((claim.life, claim.dataset), {}).setdefault(claim.generation, claim)
                if (before.version, before.as_of_us) != (claim.version, claim.as_of_us):
                    self.counts.add("wrong", f"{before} and {claim} are of one generation", count)
        for (life, name, generation), (as_of_us, rows) in self.described.items():
            known_claim = known.get((life, name), {}).get(generation)
            if known_claim is not None:
                expected = known_claim.as_of_us, row_count(name, known_claim.version)
                if expected != (as_of_us, rows):
                    self.counts.add("wrong", f"the status port reported {as_of_us}, {rows} rows of {known_claim}")
            known.setdefault((life, name), {}).setdefault(generation, Claim(life, name, generation, 0, "", as_of_us, 0))
        for by_generation in known.values():
            moments = [claim.as_of_us for _, claim in sorted(by_generation.items())]
            if moments != sorted(moments):
                self.counts.add("back", f"as_of goes back: {moments}")
        self.claims.clear()
        self.described.clear()

    def finish(self) -> None:
        """End readers, service and writers, and judge."""
        self.measure_again()
        self.stop_readers()
        self.end()
        for ledger in self.ledgers.values():
            ledger.stop()
        give_up_at = time.monotonic() + GIVE_UP_S
        while (left := sessions(self.server, self.database)) and time.monotonic() < give_up_at:
            time.sleep(0.1)
        files = [path.name for path in self.saved.iterdir() if path.name.endswith(".tmp")]
        for what in (*left, *files):
            self.counts.add("left", str(what))
        self.judge()


def microseconds(iso: str) -> int:
    """Of an ISO 8601 time, since 1970."""
    return (datetime.fromisoformat(iso) - _EPOCH) // timedelta(microseconds=1)


@contextmanager
def storm(server: EmbeddedPostgres, database: str, random: Random, **options: Any) -> Iterator[Storm]:
    """A storm whose service has loaded and whose writers and readers are at work; the caller calls `finish`."""
    directory = Path(tempfile.mkdtemp(prefix="cacheservice-faults-"))
    try:
        clock = None if COMPILER is None else ClockShim(directory)
        with mounted(directory / "saved"):
            made = Storm(server, database, directory, random, clock=clock, **options)
            made.network = Network(server.port)
            pauses_s = {"alone": 0.04, "books": 0.03, "large": 1.0}
            made.ledgers = {name: Ledger(server, database, name, pauses_s[name]) for name in LEDGERS}
            try:
                for ledger in made.ledgers.values():
                    ledger.create()
                    ledger.start()
                made.start()
                loaded = made.recovered(time.time())
                assert loaded is not None, made.life.daemon.output + made.life.daemon.errors
                made.start_readers()
                yield made
            finally:
                made.done.set()
                server.thaw()
                server.start()
                if made.lives:
                    made.life.ending = True
                    made.life.daemon.kill()
                for ledger in made.ledgers.values():
                    ledger.stop()
                made.network.close()
    finally:
        shutil.rmtree(directory)


@contextmanager
def mounted(directory: Path, size_bytes: int = DISK_BYTES) -> Iterator[None]:
    """A small file system of its own.

    :raises PermissionError: where none can be mounted.
    """
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=700", "tmpfs", str(directory)]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        raise PermissionError(
            f"may not mount a small file system; run as root or with --cap-add SYS_ADMIN: {tried.stderr}"
        )
    try:
        yield
    finally:
        # Lazily: a process that was just killed may hold a file for a moment.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


# What readers do


class Client(Protocol):
    def read(self) -> None:
        """Ask something and look at the answer."""

    def close(self) -> None: ...


class ReadFailed(Exception):
    """An answer that is none."""


def keep_reading(storm: Storm, connect: Callable[[Storm, Life, Random], Client], random: Random) -> None:
    """Read from whatever process there is; what fails counts unless that process is being ended."""
    while not storm.done.is_set():
        life = storm.life
        if life.ending or not life.served:
            time.sleep(0.01)
            continue
        try:
            with closing(connect(storm, life, random)) as client:
                while not (storm.done.is_set() or life.ending):
                    client.read()
                    time.sleep(0.01)
        except (OSError, EOFError, http.client.HTTPException, ReadFailed) as error:
            if life.ending:
                storm.counts.add("reads cut off by an end of the process")
            else:
                storm.counts.add("failed", f"{connect.__name__}: {error!r}")
                time.sleep(0.1)


def some_dataset(life: Life, random: Random) -> str:
    """One that is served; the large one rarely."""
    names = sorted(life.served)
    return random.choices(names, [1 if name == "large" else 8 for name in names])[0]


class RespClient:
    """Reads whole datasets, and the books together, in a MULTI with their reported state; and single rows."""

    def __init__(self, storm: Storm, life: Life, random: Random) -> None:
        self._storm, self._life, self._random = storm, life, random
        self._socket = socket.create_connection(life.ports["resp"], timeout=READ_LIMIT_S)
        self._replies = hiredis.Reader()
        try:
            self._ask([("HELLO", 3)])
        except BaseException:
            self.close()  # nobody else has it yet
            raise

    def close(self) -> None:
        self._socket.close()

    def read(self) -> None:
        name = some_dataset(self._life, self._random)
        if self._random.random() < 0.5:
            key = self._random.randrange(1, TABLES[name] + 1)
            words = ("GET", f"{name}:{key}") if self._random.random() < 0.5 else ("HGET", name, key)
            (document,) = self._ask([words])
            if document is None:
                raise ReadFailed(f"{words}: there is no such row")
            self._storm.examine(self._life, name, [document])
            return
        names = BOOKS if name in BOOKS and set(BOOKS) <= self._life.served else (name,)
        floors = [self._life.highest(name) for name in names]
        block = [("HGETALL", name) for name in names] + [("CACHE.INFO", name) for name in names]
        *_, replies = self._ask([("MULTI",), *block, ("EXEC",)])
        claims = set()
        for name, floor, rows, described in zip(names, floors, replies, replies[len(names) :], strict=False):
            info = {field.decode(): value for field, value in described.items()}
            claim = self._storm.examine(
                self._life,
                name,
                rows.values(),
                info["generation"],
                keys=rows.keys(),
                as_of_us=microseconds(info["as_of"].decode()),
                floor=floor,
                whole=True,
            )
            if claim is not None:
                claims.add((claim.version, claim.as_of_us, claim.seen))
        if len(claims) > 1:
            self._storm.counts.add("mixed", f"{names} in one MULTI: {claims}")

    def _ask(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        self._socket.sendall(b"".join(encode(*words) for words in commands))
        replies: list[Any] = []
        while len(replies) < len(commands):
            reply = self._replies.gets()
            if reply is False:
                data = self._socket.recv(1 << 20)
                if not data:
                    raise EOFError("the RESP port closed the connection")
                self._replies.feed(data)
                continue
            for each in reply if isinstance(reply, list) else [reply]:
                if isinstance(each, hiredis.ReplyError):
                    raise ReadFailed(f"{commands}: {each}")
            replies.append(reply)
        return replies


class HttpClient:
    """Reads whole datasets in both forms, with and without a condition, and single rows."""

    def __init__(self, storm: Storm, life: Life, random: Random) -> None:
        self._storm, self._life, self._random = storm, life, random
        self._connection = http.client.HTTPConnection(*life.ports["http"], timeout=READ_LIMIT_S)
        self._tags: dict[str, str] = {}

    def close(self) -> None:
        self._connection.close()

    def read(self) -> None:
        name = some_dataset(self._life, self._random)
        floor = self._life.highest(name)
        way = self._random.choice(("json", "ndjson", "row", "condition"))
        if way == "row":
            key = self._random.randrange(1, TABLES[name] + 1)
            response, body = self._get(f"/v1/datasets/{name}/rows/{key}", {})
            self._examine(name, [body], response, floor)
            return
        headers = {"Accept": "application/x-ndjson" if way == "ndjson" else "application/json"}
        if way == "condition" and name in self._tags:
            headers["If-None-Match"] = self._tags[name]
        response, body = self._get(f"/v1/datasets/{name}", headers)
        tag, generation = response.headers["ETag"], int(response.headers["X-Cache-Generation"])
        if response.status == 304:
            self._storm.counts.add("answers")
            if tag != self._tags[name]:
                self._storm.counts.add("wrong", f"a 304 with {tag} for {self._tags[name]}")
            if not self._life.note_received(name, generation, floor):
                self._storm.counts.add("back", f"{name}: a 304 of {generation} after {floor}")
            return
        if way == "ndjson":
            lines = [json.loads(line) for line in body.splitlines()]
            keys, documents = [line["key"] for line in lines], [json.dumps(line["value"]) for line in lines]
        else:
            self._tags[name] = tag
            parsed_body = json.loads(body)
            keys, documents = list(parsed_body), [json.dumps(value) for value in parsed_body.values()]
        self._examine(name, documents, response, floor, keys=keys, whole=True)

    def _examine(self, name: str, documents: Sequence[Any], response: Any, floor: int, **reported: Any) -> None:
        generation = int(response.headers["X-Cache-Generation"])
        claim = self._storm.examine(self._life, name, documents, generation, floor=floor, **reported)
        modified = int(parsedate_to_datetime(response.headers["Last-Modified"]).timestamp())
        # It is that of the first read of these rows, and the claim may be a later one.
        if claim is not None and modified > claim.as_of_us // 1_000_000:
            self._storm.counts.add("wrong", f"Last-Modified {modified} of {claim}")

    def _get(self, path: str, headers: dict[str, str]) -> tuple[Any, bytes]:
        self._connection.request("GET", path, headers=headers)
        response = self._connection.getresponse()
        body = response.read()
        if response.status not in (200, 304):
            raise ReadFailed(f"{path}: {response.status} {body[:200]!r}")
        return response, body


class StatusClient:
    """Asks for everything, and whether it is ready, on one connection."""

    def __init__(self, storm: Storm, life: Life, random: Random) -> None:
        self._storm, self._life = storm, life
        self._socket = socket.create_connection(life.ports["status"], timeout=READ_LIMIT_S)
        self._lines = self._socket.makefile("r", encoding="utf-8")
        try:
            self._ask("prompt")
        except BaseException:
            self.close()  # nobody else has it yet
            raise

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def _ask(self, question: str) -> str:
        """The reply, which ends with an empty line."""
        self._socket.sendall(f"{question}\n".encode())
        reply = ""
        while line := self._lines.readline():
            if line == "\n":
                return reply.removesuffix("\n")
            reply += line
        raise EOFError("the status port closed the connection")

    def read(self) -> None:
        storm, life = self._storm, self._life
        served = life.served
        floors = {name: life.highest(name) for name in served}
        asked_us = time.time() * 1e6
        datasets = json.loads(self._ask("json"))["datasets"]
        storm.counts.add("answers")
        for name, floor in floors.items():
            described = datasets[name]
            if described["as_of"] is None:
                raise ReadFailed(f"json: {name} has no snapshot")
            generation, as_of_us = described["generation"], microseconds(described["as_of"])
            if not life.note_received(name, generation, floor):
                storm.counts.add("back", f"{name}: {generation} after {floor}")
            claim = (as_of_us, described["rows"])
            if storm.described.setdefault((life.number, name, generation), claim) != claim:
                storm.counts.add("wrong", f"{name} {generation}: {claim}")
            # What is from the disk is as old as the wall clock indicates, which may be turned.
            if described["source"] == "postgres" and described["age_s"] * 1e6 < asked_us - as_of_us - 2000:
                storm.counts.add("young", f"{name}: {described['age_s']} s, {(asked_us - as_of_us) / 1e6} s passed")
        ready = self._ask("ready")
        storm.counts.add("answers")
        if ready.split(" ")[0] not in ("ready", "notready") or any(f"{name}:never_loaded" in ready for name in served):
            raise ReadFailed(f"ready: {ready}")
        time.sleep(0.04)


# What can go wrong, each from its begin to its end


@contextmanager
def _frozen(storm: Storm, *, backends: bool) -> Iterator[None]:
    storm.server.freeze(backends=backends)
    try:
        yield
    finally:
        storm.server.thaw()


@contextmanager
def _database_down(storm: Storm) -> Iterator[None]:
    storm.server.stop("immediate")
    try:
        yield
    finally:
        storm.server.start()


@contextmanager
def _sessions_ended(storm: Storm) -> Iterator[None]:
    over = threading.Event()

    def end_them() -> None:
        statement = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = %s AND application_name LIKE 'cacheservice%%' AND application_name NOT LIKE '%%tests'"
        )
        while not over.wait(0.05):
            query(storm.server, "postgres", statement, (storm.database,))

    thread = threading.Thread(target=end_them, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(GIVE_UP_S)


@contextmanager
def _locked(storm: Storm) -> Iterator[None]:
    table = storm.random.choice(list(TABLES))
    with closing(connect(storm.server, storm.database)) as connection, connection.cursor() as cursor:
        cursor.execute(f"BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield


@contextmanager
def _truncated(storm: Storm) -> Iterator[None]:
    for ledger in storm.ledgers.values():
        for _ in range(3):
            ledger.order("truncate")
    yield


@contextmanager
def _emptied(storm: Storm) -> Iterator[None]:
    ledger = storm.ledgers[storm.random.choice(list(LEDGERS))]
    ledger.order("empty")
    try:
        yield
    finally:
        before = len(ledger.versions)
        ledger.order("fill")
        wait_until(lambda: len(ledger.versions) > before, "full tables")


@contextmanager
def _network(storm: Storm, verb: str, *ranges: tuple[float, float]) -> Iterator[None]:
    numbers = [
        storm.random.randint(*each) if isinstance(each[0], int) else storm.random.uniform(*each) for each in ranges
    ]
    storm.network.order(verb, *numbers)
    try:
        yield
    finally:
        storm.network.order("heal")


@contextmanager
def _disk_full(storm: Storm) -> Iterator[None]:
    junk = storm.saved / "junk"
    with junk.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        assert shutil.disk_usage(storm.saved).free == 0
        yield
    finally:
        junk.unlink()


@contextmanager
def _disk_read_only(storm: Storm) -> Iterator[None]:
    def remount(how: str) -> bool:
        command = ["mount", "-o", f"remount,{how}", str(storm.saved)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    # Busy as long as a file is open for writing: between two saves it is not.
    wait_until(lambda: remount("ro"), "a moment without a save")
    try:
        yield
    finally:
        assert remount("rw")


@contextmanager
def _damaged(storm: Storm) -> Iterator[None]:
    """One byte of the newest file of a dataset, found at a start beside a frozen database."""
    with _frozen(storm, backends=True):
        storm.end(signal.SIGKILL)
        name = storm.random.choice(list(TABLES))
        files = sorted(storm.saved.glob(f"{name}.*.snapshot"))
        content = bytearray(files[-1].read_bytes())
        content[storm.random.randrange(len(content))] ^= 1 << storm.random.randrange(8)
        files[-1].write_bytes(content)
        for other in BOOKS if name in BOOKS else (name,):
            storm.last_saved.pop(other, None)
        if name not in BOOKS and len(files) > 1:
            storm.last_saved[name] = int(files[-2].name.split(".")[1])
        storm.start()
        yield
        try:
            wait_until(lambda: storm.life.events["snapshot_rejected"], "the refusal of the damaged file")
        except AssertionError as error:
            storm.counts.add("damage", f"{files[-1].name}: {error}")
    # By now the next publish may have been saved under the same number.
    if files[-1].exists() and files[-1].read_bytes() == content:
        storm.counts.add("damage", f"{files[-1].name} is still there")


@contextmanager
def _clock(storm: Storm, offset_s: int) -> Iterator[None]:
    storm.turn_clock(offset_s)
    try:
        yield
    finally:
        storm.turn_clock(0)


@contextmanager
def _clock_restart(storm: Storm, offset_s: int) -> Iterator[None]:
    """The process ends, the clock is turned, the process starts beside a frozen database."""
    with _frozen(storm, backends=True):
        storm.end()
        with _clock(storm, offset_s):
            storm.start()
            yield
            wait_until(lambda: storm.life.served or storm.life.events["group_not_restored"], "what was saved")
            asked_s = time.time()
            for name, described in storm.life.datasets().items():
                if described["source"] != "disk":
                    continue
                # As long as the machine runs, the wall clock does not matter.
                passed_s = asked_s - microseconds(described["as_of"]) / 1e6
                if not passed_s - 0.002 <= described["age_s"] < passed_s + HOUR_S / 2:
                    storm.counts.add("young", f"{name} from the disk, {passed_s} s passed: {described}")


@contextmanager
def _restarted(storm: Storm, number: signal.Signals) -> Iterator[None]:
    storm.end(number)
    yield
    storm.start()


@contextmanager
def _killed_beside_a_frozen_database(storm: Storm) -> Iterator[None]:
    with _frozen(storm, backends=True):
        storm.end(signal.SIGKILL)
        storm.start()
        yield
        wait_until(lambda: storm.life.served or storm.life.events["group_not_restored"], "what was saved")


@contextmanager
def flood(storm: Storm, clients: int = 150) -> Iterator[None]:
    """More clients of each port than a process of 64 descriptors can have."""
    with ExitStack() as there:
        for address in storm.life.ports.values():
            for _ in range(clients):
                there.enter_context(socket.create_connection(address, timeout=READ_LIMIT_S))
        yield


@contextmanager
def _stopped(storm: Storm) -> Iterator[None]:
    storm.life.daemon.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        storm.life.daemon.process.send_signal(signal.SIGCONT)


Fault = Callable[[Storm], Any]

FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        "database: postmaster frozen": lambda storm: _frozen(storm, backends=False),
        "database: all of it frozen": lambda storm: _frozen(storm, backends=True),
        "database: stopped at once, restarted": _database_down,
        "database: sessions terminated": _sessions_ended,
        "database: a table locked": _locked,
        "database: tables truncated and refilled": _truncated,
        "database: tables emptied for a while": _emptied,
        "network: delay": lambda storm: _network(storm, "delay", (0.05, 1.0)),
        "network: slices": lambda storm: _network(storm, "slice", (200, 2000)),
        "network: silence": lambda storm: _network(storm, "silence", (0, 100_000)),
        "network: resets": lambda storm: _network(storm, "reset", (0, 100_000)),
        "network: truncated": lambda storm: _network(storm, "truncate", (0, 100_000)),
        "network: half open": lambda storm: _network(storm, "half_open"),
        "network: refused": lambda storm: _network(storm, "refuse"),
        "disk: full": _disk_full,
        "disk: read only": _disk_read_only,
        "clock: an hour back": lambda storm: _clock(storm, -HOUR_S),
        "clock: an hour ahead": lambda storm: _clock(storm, HOUR_S),
        "process: frozen": _stopped,
        "process: killed": lambda storm: _restarted(storm, signal.SIGKILL),
        "process: terminated": lambda storm: _restarted(storm, signal.SIGTERM),
        "process: killed beside a frozen database": _killed_beside_a_frozen_database,
        "process: killed, its newest file damaged": _damaged,
        "process: restarted an hour back": lambda storm: _clock_restart(storm, -HOUR_S),
        "process: restarted an hour ahead": lambda storm: _clock_restart(storm, HOUR_S),
    }
)
ENDING = tuple(name for name in FAULTS if name.startswith("process: ") and name != "process: frozen")
"""Faults that end the process."""


def possible(storm: Storm) -> list[str]:
    """The faults that are possible here: those of the clock need a compiler."""
    return [name for name in FAULTS if storm.clock is not None or ("clock" not in name and "hour" not in name)]


# Files, in this process


class StoreLog:
    """The log of a store."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def bind(self, **_: Any) -> StoreLog:
        return self

    def info(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    warning = error = info

    def named(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


class Shelf:
    """A folder of saved generations of one dataset, which is restored from again and again.

    Its async methods need the reactor.
    """

    def __init__(self, directory: Path, random: Random, counts: Counts) -> None:
        self.directory = directory
        self._random = random
        self._counts = counts

    def path(self, generation: int) -> Path:
        return self.directory / f"products.{generation:012}.snapshot"

    def _store(self, cache: Cache, keep: int, log: StoreLog) -> SnapshotStore:
        settings = PersistenceSettings(directory=str(self.directory), min_save_interval_s=0, keep_generations=keep)
        return SnapshotStore(cache, settings, lambda _: None, reactor, log)

    async def restore(self) -> tuple[Snapshot | None, StoreLog]:
        """What a start would serve, and what it reports."""
        cache, log = Cache([SETTINGS], reactor.seconds), StoreLog()
        store = self._store(cache, 2, log)
        await restore(store, cache, reactor, log)
        await store.stopService()  # which releases the lock of the directory
        return cache.dataset("products").snapshot, log

    async def save(self, tables: Sequence[Mapping[bytes, bytes]]) -> None:
        """Each as a generation, from 1 on."""
        cache, log = Cache([SETTINGS], reactor.seconds), StoreLog()
        store = self._store(cache, len(tables), log)
        store.startService()
        for generation, table in enumerate(tables, 1):
            rows = rows_builder()
            rows.add(list(table.items()))
            snapshot = Snapshot(generation, rows.finish(), datetime.now(UTC), reactor.seconds(), "1:1:")
            cache.dataset("products").publish(snapshot)
            while len(log.named("snapshot_saved")) < generation:
                await deferLater(reactor, 0.001)
        await store.stopService()

    async def damage(self, corruptions: int, truncate_bytes: int, rows: int) -> None:
        """Change a single byte of the newest of two files, so often, and cut it off at every so many bytes: each time
        the one before it has to be served, and the damaged one to be moved aside."""
        tables = [{b"%d" % number: self._random.randbytes(400) for number in range(rows)} for _ in range(2)]
        await self.save(tables)
        good = self.path(2).read_bytes()
        for _ in range(corruptions):
            damaged = bytearray(good)
            at = self._random.randrange(len(good))
            damaged[at] ^= self._random.randrange(1, 256)
            await self._refused(bytes(damaged), tables[0], f"byte {at} of {len(good)}")
            self._counts.add("corruptions")
        for size in range(0, len(good), truncate_bytes):
            await self._refused(good[:size], tables[0], f"{size} of {len(good)} bytes")
            self._counts.add("truncations")

    async def _refused(self, content: bytes, before: Mapping[bytes, bytes], what: str) -> None:
        self.path(2).write_bytes(content)
        snapshot, log = await self.restore()
        served = None if snapshot is None else (snapshot.generation, dict(snapshot.rows.items()))
        if served != (1, before) or self.path(2).exists() or len(log.named("snapshot_rejected")) != 1:
            self._counts.add("damage", f"{what}: generation {served and served[0]}, {log.events}")

    async def kill(self, kills: int, rows: int, most_s: float) -> None:
        """Kill a process that saves one generation after the other at a random moment of the first `most_s`, so often:
        each start has to serve the generation that was being saved or the one before it, whole."""
        self.directory.mkdir(exist_ok=True)
        for _ in range(kills):
            begun = await deferToThread(killed_after, self.directory, rows, self._random.uniform(0.0, most_s))
            snapshot, log = await self.restore()
            generation = snapshot.generation if snapshot else 0
            whole = snapshot is None or dict(snapshot.rows.items()) == dict(rows_of_generation(generation, rows))
            others = [path.name for path in self.directory.iterdir() if not path.name.endswith(".snapshot")]
            if generation not in (begun - 1, begun) or not whole or others or log.named("snapshot_rejected"):
                self._counts.add(
                    "killed", f"in generation {begun}: {generation}, whole {whole}, {others}, {log.events}"
                )
            self._counts.add("kills")
            self._counts.add(f"kills that loaded the {'new' if generation == begun else 'old'} generation")
