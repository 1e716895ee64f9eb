"""The writers and the readers."""

from __future__ import annotations

import json
import socket
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from random import Random
from typing import Any
from zlib import crc32

import hiredis
import psycopg2

from benchmarks.jepsen.cluster import Cluster
from benchmarks.jepsen.judge import Claim, Judge, Life
from benchmarks.jepsen.money import ACCOUNTS, BANKS, BEAT_S, HTTP_LIMIT_S, READ_PAUSE_S, TABLES, WAIT_MS, WRITES_PER_S
from benchmarks.jepsen.service import Service


class Worker(threading.Thread, ABC):
    """Does one thing again and again until it is stopped; a lost connection is made again."""

    def __init__(self, name: str, judge: Judge, seed: str) -> None:
        super().__init__(name=name, daemon=True)
        self.judge = judge
        self.choose = Random(seed)
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            try:
                self.converse()
            except (OSError, HTTPException, psycopg2.Error, hiredis.HiredisError) as error:
                self.judge.count(f"interruptions of {type(self).__name__}: {type(error).__name__}")
                self.stopped.wait(0.1)
            except Exception:
                self.judge.found("mistakes of the program", traceback.format_exc())
                self.stopped.wait(1)

    @abstractmethod
    def converse(self) -> None:
        """One turn of its work, on connections of its own."""


class Writer(Worker):
    """Moves money, and asks CACHE.WAIT now and then whether it can be read."""

    def __init__(self, number: int, cluster: Cluster, service: Service, judge: Judge, seed: str) -> None:
        super().__init__(f"writer {number}", judge, f"{seed} writer {number}")
        self._cluster, self._service = cluster, service

    def converse(self) -> None:
        epoch = self.judge.epoch
        with closing(self._cluster.primary.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '2s'; SET statement_timeout = '10s'")
            connection.commit()
            while not self.stopped.wait(self.choose.expovariate(WRITES_PER_S)):
                if epoch != self.judge.epoch:
                    return
                self.move(connection, cursor, epoch)

    def move(self, connection: Any, cursor: Any, epoch: int) -> None:
        names = self.choose.choice(BANKS)
        source, target = self.choose.choice(names), self.choose.choice(names)
        one, other = self.choose.sample(range(1, ACCOUNTS + 1), 2)
        amount = self.choose.randrange(1, 100)
        written = []
        for table, number, change in sorted(((source, one, -amount), (target, other, amount))):
            cursor.execute(f"UPDATE {table} SET n = n + %s, v = v + 1 WHERE id = %s RETURNING v, n", (change, number))
            written.append((table, number, *cursor.fetchone()))
            if self.choose.random() < 0.1:
                time.sleep(self.choose.uniform(0, 0.3))  # a transaction that stays open
        if self.choose.random() < 0.1:
            connection.rollback()
            self.judge.count("transactions rolled back")
            return
        cursor.execute("SELECT pg_current_xact_id()::text")
        xid = int(cursor.fetchone()[0])
        for table, number, v, n in written:
            self.judge.will_write(table, number, v, n)
        connection.commit()
        self.judge.count("transactions")
        if self.choose.random() < 0.05:
            self.wait_for(xid, written[-1], epoch)

    def wait_for(self, xid: int, written: tuple[str, int, int, int], epoch: int) -> None:
        """Once CACHE.WAIT confirms a write, a reader sees it."""
        table, number, v, _ = written
        life = self._service.life
        try:
            with closing(Resp(self._service.ports["resp"])) as client:
                (answer,) = client.ask(("CACHE.WAIT", table, xid, WAIT_MS))
                (document,) = client.ask(("GET", f"{table}:{number}"))
        except OSError:
            return
        if epoch != self.judge.epoch or life is not self._service.life or isinstance(document, Exception):
            return
        self.judge.count(f"CACHE.WAIT answered {answer}")
        if answer == 1 and json.loads(document)["v"] < v:
            self.judge.found("confirmed writes unseen", f"{table}:{number} of {xid}: {document!r}, written {v}")


class Beat(Worker):
    """Moves the clock in all tables by one transaction, and knows when each was committed."""

    def __init__(self, cluster: Cluster, judge: Judge) -> None:
        super().__init__("beat", judge, "")
        self._cluster = cluster
        self._number = 0

    def converse(self) -> None:
        statement = "; ".join(f"UPDATE {table} SET beat = %(beat)s, v = %(beat)s WHERE id = 0" for table in TABLES)
        while self.judge.unsettled:
            self.stopped.wait(0.02)
        epoch = self.judge.epoch
        with closing(self._cluster.primary.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("SET statement_timeout = '10s'")
            connection.commit()
            while not self.stopped.wait(BEAT_S) and epoch == self.judge.epoch:
                self._number += 1
                for table in TABLES:
                    self.judge.will_write(table, 0, self._number, 0)
                    self.judge.forget(table, self._number - int(3600 / BEAT_S))
                cursor.execute(statement, {"beat": self._number})
                connection.commit()
                self.judge.acknowledge(self._number, epoch)


class Resp:
    """A client of the RESP port."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=HTTP_LIMIT_S)
        self._reader = hiredis.Reader()

    def close(self) -> None:
        self._socket.close()

    def ask(self, *commands: Sequence[Any]) -> list[Any]:
        self._socket.sendall(b"".join(hiredis.pack_command(tuple(map(str, command))) for command in commands))
        answers: list[Any] = []
        while len(answers) < len(commands):
            while (answer := self._reader.gets()) is not False:
                answers.append(answer)
            if len(answers) < len(commands):
                part = self._socket.recv(262_144)
                if not part:
                    raise ConnectionError("the service closed the connection")
                self._reader.feed(part)
        return answers


class RespReader(Worker):
    """Reads all tables of one bank in one MULTI."""

    def __init__(self, number: int, service: Service, judge: Judge, seed: str) -> None:
        super().__init__(f"RESP reader {number} of {service.name}", judge, f"{seed} resp {service.name} {number}")
        self._service = service

    def converse(self) -> None:
        with closing(Resp(self._service.ports["resp"])) as client:
            life = self._service.life
            while not self.stopped.wait(self.choose.uniform(0, 2 * READ_PAUSE_S)) and life is self._service.life:
                names = self.choose.choice(BANKS)
                words = [words for name in names for words in (("CACHE.INFO", name), ("HGETALL", name))]
                floors = self.judge.floors(life, names)
                sent_at = time.monotonic()
                *_, answer = client.ask(("MULTI",), *words, ("EXEC",))
                if isinstance(answer, Exception) or any(isinstance(each, Exception) for each in answer):
                    self.judge.count("answers that refuse")
                    continue
                self.check(life, names, floors, sent_at, answer)

    def check(
        self, life: Life, names: Sequence[str], floors: Mapping[str, int], sent_at: float, answer: list[Any]
    ) -> None:
        self.judge.count(f"answers of {self._service.name} over RESP")
        pairs = [dict(zip(each[::2], each[1::2], strict=True)) for each in answer]
        infos, documents = pairs[::2], pairs[1::2]
        where = f"{self.name}, life {life.number}, {names}"
        rows = {
            name: {int(key): json.loads(document) for key, document in found.items()}
            for name, found in zip(names, documents, strict=True)
        }
        self.judge.check_rows(where, names, rows)
        if len({info[b"as_of"] for info in infos}) > 1:
            self.judge.found("mixed moments", f"{where}: {[info[b'as_of'] for info in infos]}")
        for name, info, found in zip(names, infos, documents, strict=True):
            generation = int(info[b"generation"])
            content = crc32(b"".join(key + value for key, value in sorted(found.items())))
            self.judge.check_generation(life, floors[name], name, generation, content, where)
            claim = (name, sent_at, float(info[b"age_s"]), rows[name][0]["beat"])
            self.judge.claim(Claim(self._service.name, where, *claim, self._service.name == "replica"))


class HttpReader(Worker):
    """Reads one dataset, sometimes with a limit of its age, sometimes if it has changed."""

    def __init__(self, number: int, service: Service, judge: Judge, seed: str) -> None:
        super().__init__(f"HTTP reader {number} of {service.name}", judge, f"{seed} http {service.name} {number}")
        self._service = service

    def converse(self) -> None:
        with closing(HTTPConnection("127.0.0.1", self._service.ports["http"], timeout=HTTP_LIMIT_S)) as client:
            life = self._service.life
            tags: dict[str, tuple[str, int]] = {}
            while not self.stopped.wait(self.choose.uniform(0, 4 * READ_PAUSE_S)) and life is self._service.life:
                name = self.choose.choice(TABLES)
                path, headers = f"/v1/datasets/{name}", {}
                if self.choose.random() < 0.2:
                    path += "?max_age=2"
                if name in tags and self.choose.random() < 0.4:
                    headers["If-None-Match"] = tags[name][0]
                sent_at = time.monotonic()
                client.request("GET", path, headers=headers)
                response = client.getresponse()
                body = response.read()
                if response.status not in (200, 304):
                    self.judge.count(f"answers {response.status} over HTTP")
                    continue
                self.judge.count(f"answers of {self._service.name} over HTTP")
                where = f"{self.name}, life {life.number}, {path} {response.status}"
                if response.status == 200:
                    rows = {int(key): row for key, row in json.loads(body).items()}
                    if (name,) in BANKS:
                        self.judge.check_rows(where, (name,), {name: rows})
                    tags[name] = (response.headers["ETag"], rows[0]["beat"])
                elif tags[name][0] != response.headers["ETag"]:
                    self.judge.found("304 with another ETag", where)
                claim = (name, sent_at, float(response.headers["Age"]), tags[name][1])
                self.judge.claim(Claim(self._service.name, where, *claim, self._service.name == "replica"))
