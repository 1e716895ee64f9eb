"""Readers of a fleet whose processes are killed: a connection may end only with the process that served it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from http.client import HTTPException
from typing import NamedTuple, Protocol

from tests.kit.http import ask_on
from tests.kit.processes import ONE_MOMENT, products
from tests.kit.resp import Client
from tests.kit.waiting import GIVE_UP_S
from tests.kit.workers import Address, server_of, workers_of

ROWS = 50
WHOLE_PRODUCTS = products(f"SELECT id, n FROM generate_series(1, {ROWS}) AS id, {ONE_MOMENT}")
_CLOCKS_S = 0.2
"""How much an age may be less than by the wall clock, which the system adjusts."""
_PAUSE_S = 0.02
_MOST_ANSWERS = 50
"""On one connection, so that workers that have been started again get clients."""


class Sight(NamedTuple):
    """A complete answer: the generation, 0 if the port has none, and the moment of the read."""

    generation: int
    n: int


class Broken(Exception):
    """An answer that breaks a law."""


class Killed:
    """The processes that are dead or about to be."""

    def __init__(self) -> None:
        self._pids: set[int] = set()

    def add(self, *pids: int) -> None:
        self._pids.update(pids)

    def __contains__(self, pid: int | None) -> bool:
        return pid in self._pids

    def __len__(self) -> int:
        return len(self._pids)


class Process(NamedTuple):
    """A process of the fleet as its readers see it: `pids` are the main process, and then its workers."""

    pid: int
    http: Address
    resp: Address

    def pids(self) -> list[int]:
        return [self.pid, *workers_of(self.pid)]


class Way(Protocol):
    """How one reader asks."""

    def address(self, process: Process) -> Address: ...

    def ask(self, client: socket.socket) -> tuple[Sight, float]:
        """Return what is served, and its age in seconds.

        :raises Broken: if it is an error, or not one read of all rows.
        """


class OverHttp:
    """The whole dataset as JSON."""

    def address(self, process: Process) -> Address:
        return process.http

    def ask(self, client: socket.socket) -> tuple[Sight, float]:
        answer = ask_on(client, "/v1/datasets/products", Accept="application/x-ndjson")
        if answer.status != 200:
            raise Broken(f"{answer.status} {answer.body!r}")
        n = one_moment([json.loads(line)["value"] for line in answer.body.splitlines()])
        # The header has whole seconds.
        return Sight(int(answer.headers["x-cache-generation"]), n), int(answer.headers["age"]) + 1


class OverResp:
    """A hash, and its age, of one moment."""

    def address(self, process: Process) -> Address:
        return process.resp

    def ask(self, client: socket.socket) -> tuple[Sight, float]:
        commands = [("MULTI",), ("HGETALL", "products"), ("CACHE.AGE", "products"), ("EXEC",)]
        *_, replies = Client(client).ask_all(list(commands))
        if not isinstance(replies, list) or not isinstance(replies[0], list):
            raise Broken(repr(replies))
        return Sight(0, one_moment([json.loads(document) for document in replies[0][1::2]])), float(replies[1])


def one_moment(rows: list[dict[str, int]]) -> int:
    """Return the moment that all rows have.

    :raises Broken: if they have several, or if rows are missing.
    """
    moments = {row["n"] for row in rows}
    if len(rows) != ROWS or len(moments) != 1:
        raise Broken(f"{len(rows)} rows of {len(moments)} moments")
    return moments.pop()


class PatientReader(threading.Thread):
    """Reads all rows again and again until it is stopped, or until the main process of its port is killed.

    It connects again after some answers, or if the process that served it was killed, which was a worker.
    `problem` is the first answer that breaks a law: an error, a refused connection, rows of several reads, a generation
    or a moment that is less than one before on the same connection, or an age that is too small.
    """

    def __init__(self, process: Process, way: Way, killed: Killed) -> None:
        super().__init__(daemon=True)
        self.seen: list[Sight] = []
        self.answers = 0
        self.problem: str | None = None
        self._process, self._way, self._killed = process, way, killed
        self._pid: int | None = None
        self._deaths = 0
        self._stopping = threading.Event()
        self.start()

    @property
    def last(self) -> Sight:
        return self.seen[-1] if self.seen else Sight(0, 0)

    def end(self) -> None:
        """Read no more."""
        self._stopping.set()
        self.join(GIVE_UP_S)

    def stop(self) -> None:
        """Read no more.

        :raises AssertionError: if a law was broken.
        """
        self.end()
        assert self.problem is None, self.problem

    def run(self) -> None:
        while not self._stopping.is_set() and self._process.pid not in self._killed:
            self._pid, self._deaths = None, len(self._killed)
            try:
                with closing(socket.create_connection(self._way.address(self._process), GIVE_UP_S)) as client:
                    self._read(client)
            except Broken as broken:
                self.problem = self._described(str(broken))
                return
            except (OSError, EOFError, HTTPException) as error:
                if not self._may_be_lost():
                    self.problem = self._described(repr(error))
                    return
            except Exception as error:  # an answer that is nothing of what is expected
                self.problem = self._described(repr(error))
                raise

    def _described(self, problem: str) -> str:
        return f"{type(self._way).__name__}, served by {self._pid} of {self._process}: {problem}"

    def _may_be_lost(self) -> bool:
        """Whether the process at the other end, if it is known, has been killed."""
        if self._process.pid in self._killed or self._pid in self._killed:
            return True
        return self._pid is None and len(self._killed) > self._deaths

    def _read(self, client: socket.socket) -> None:
        before = Sight(0, 0)
        for _ in range(_MOST_ANSWERS):
            if self._stopping.wait(_PAUSE_S):
                return
            asked_at = time.time()
            sight, age_s = self._way.ask(client)
            self.answers += 1
            # Before the first answer the connection may still wait to be accepted.
            self._pid = self._pid or server_of(client, self._process.pids())
            if sight.generation < before.generation or sight.n < before.n:
                raise Broken(f"{sight} after {before}")
            if age_s + _CLOCKS_S < asked_at - sight.n / 1e6:
                raise Broken(f"an age of {age_s} s at {asked_at} of {sight}")
            if sight != self.last:
                self.seen.append(sight)
            before = sight


class Sampled(threading.Thread):
    """Reads some rows of a large dataset at once, again and again; all of them must have the moment of one read."""

    def __init__(self, port: int, keys: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self.problem: str | None = None
        self.moments: list[int] = []
        self._address, self._keys = ("127.0.0.1", port), keys
        self._stopping = threading.Event()
        self.start()

    def end(self) -> None:
        """Read no more."""
        self._stopping.set()
        self.join(GIVE_UP_S)

    def stop(self) -> list[int]:
        """Read no more; return the moments that were served.

        :raises AssertionError: if a law was broken.
        """
        self.end()
        assert self.problem is None, self.problem
        return self.moments

    def run(self) -> None:
        try:
            with closing(socket.create_connection(self._address, GIVE_UP_S)) as client:
                while not self._stopping.wait(_PAUSE_S):
                    self._read(Client(client).ask("HMGET", "products", *self._keys))
        except Exception as error:  # whatever it is, it is a problem
            self.problem = repr(error)

    def _read(self, documents: list[bytes]) -> None:
        moments = {json.loads(document)["n"] for document in documents}
        if len(moments) != 1:
            raise Broken(f"rows of {len(moments)} moments")
        if moments != set(self.moments[-1:]):
            self.moments += moments
        if self.moments[-2:] != sorted(self.moments[-2:]):
            raise Broken(f"{self.moments[-1]} after {self.moments[-2]}")
