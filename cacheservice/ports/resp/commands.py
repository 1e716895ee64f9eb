"""The commands of the RESP port.

Each command takes a client and its words, and returns a reply: bytes; or an iterator of bytes if the reply is too large
for one turn of the reactor (it keeps the snapshot with which it began); or a Deferred if the reply has to wait.
"""

from __future__ import annotations

import hmac
import json
import math
import os
import platform
import resource
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice import __version__
from cacheservice.base.errors import UnknownDataset
from cacheservice.cache.cache import Cache
from cacheservice.cache.counts import Reads
from cacheservice.cache.dataset import Dataset, Snapshot, State
from cacheservice.cache.events import Added, Changed, Ended, Event, Published, Renewed
from cacheservice.cache.rows import PATCHED_GROUP_BITS, PATCHED_GROUP_MASK, Groups, Rows, Shards, bulk
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.held import Streamed
from cacheservice.ports.resp import reply
from cacheservice.ports.resp.reply import CHUNK_ROWS, CommandError
from cacheservice.ports.resp.requests import integer
from cacheservice.ports.resp.scan import END_OF_DATASET, MAX_COUNT, SortedShards, glob, numbered, scan_rows
from cacheservice.views import collect
from cacheservice.views import json as as_json

if TYPE_CHECKING:
    from cacheservice.ports.resp.protocol import RespProtocol

Reply = bytes | Iterator[bytes] | Deferred[bytes]
Words = Sequence[bytes]
T = TypeVar("T")
_Served = tuple[Shards, Groups, int, Reads]
"""The parts of a dataset that `Commands.hits` needs: its shards, if they are in one group; its groups; the mask; and
its read counts."""

REDIS_VERSION = "7.0.15"
"""The version in INFO and HELLO, whose behaviour this port follows."""

_WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"
_NOT_AN_INTEGER = "ERR value is not an integer or out of range"
SYNTAX = "ERR syntax error"
_FLAGS = frozenset({"flags", "categories"})
_KEYS_PER_TURN = 4096
_MAX_WAIT_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its function, and the limits for the number of its words.

    Its own name counts as a word.
    """

    name: str
    run: Callable[[Commands, RespProtocol, Words], Reply]
    least: int
    most: float = math.inf


class Commands:
    """The commands, and the state that all clients of the port share.

    :param password: the password for AUTH; empty for no password.
    """

    def __init__(self, cache: Cache, freshness: Freshness, password: str) -> None:
        self._cache = cache
        self._freshness = freshness
        self._password = password.encode()
        self._datasets: dict[bytes, Dataset] = {}
        # The datasets in the order of SCAN; None until it is needed.
        self._numbered: list[tuple[int, bytes]] | None = None
        self._sorted = SortedShards()
        catalogue = resources.files(__package__).joinpath("catalogue.json").read_text("utf-8")
        self.catalogue = json.loads(catalogue, object_hook=_flags_as_statuses)
        self.writes = frozenset(name.encode() for name in self.catalogue["writes"])
        # Functions, not bound methods, which would make each copy by `frozen` a reference cycle.
        self.by_name: Mapping[bytes, Command] = {each.name.encode(): each for each in _commands()}
        # In the spellings that clients use, so that most commands need one look-up.
        self.by_word: Mapping[bytes, Command] = self.by_name | {
            name.upper(): each for name, each in self.by_name.items()
        }
        # The datasets that `hits` may answer without a check: loaded, and served at any age.
        self._served: dict[bytes, _Served] = {}
        cache.events.subscribe(self._declared, Added, Changed)
        cache.events.subscribe(self._ended, Ended)
        # A renewed snapshot may have other row objects with the same content.
        cache.events.subscribe(self._serve, Published, Renewed)
        for dataset in cache.datasets.values():
            self._declared(Added(dataset.name))

    def frozen(self) -> Commands:
        """Return a copy of these commands that keeps the snapshots served now."""
        frozen = copy(self)
        frozen._datasets = {name: copy(dataset) for name, dataset in self._datasets.items()}
        frozen._served = {}  # otherwise a publish would change them
        return frozen

    def _declared(self, event: Event) -> None:
        name = event.dataset.encode()
        self._served.pop(name, None)
        if name not in self._datasets:
            self._datasets[name] = self._cache.dataset(event.dataset)
            self._numbered = None
        self._serve(event)

    def _ended(self, event: Event) -> None:
        name = event.dataset.encode()
        self._served.pop(name, None)
        del self._datasets[name]
        self._numbered = None

    def _serve(self, event: Event) -> None:
        dataset = self._cache.dataset(event.dataset)
        if dataset.snapshot is not None and dataset.settings.on_expired == "serve":
            groups, mask = dataset.snapshot.rows.groups, dataset.snapshot.rows.mask
            shards = groups[0] if len(groups) == 1 else []
            self._served[dataset.name.encode()] = shards, groups, mask, dataset.counts.resp

    def snapshots(self) -> dict[str, Snapshot]:
        """Return all snapshots that are served now."""
        return {dataset.name: dataset.snapshot for dataset in self._datasets.values() if dataset.snapshot is not None}

    def _keeping(self, answer: bytes | Iterator[bytes], names: Iterable[bytes]) -> Reply:
        """Return the answer, with the snapshots that it uses if it is in pieces.

        :param names: the datasets of the answer.
        """
        if isinstance(answer, bytes):
            return answer
        datasets = [self._datasets[name] for name in names]
        return Streamed(answer, {each.name: each.snapshot for each in datasets if each.snapshot is not None})

    # Finding datasets and rows

    def rows(self, name: bytes) -> Rows:
        """Return the rows that `name` serves now.

        :raises CommandError: LOADING or NOTLOADED without a snapshot, STALE if it is expired and `on_expired` is
            "refuse" (docs/reading.md), or ERR for an unknown dataset.
        """
        dataset = self._dataset(name)
        snapshot = dataset.snapshot
        if snapshot is None:
            raise CommandError(self._not_loaded(dataset))
        if dataset.settings.on_expired == "refuse" and dataset.state() is State.EXPIRED:
            age_s, limit_s = dataset.age_s() or 0.0, dataset.settings.max_age_s
            raise CommandError(f"STALE {dataset.name} is {age_s:.0f} s old, limit {limit_s:g} s")
        return snapshot.rows

    def _not_loaded(self, dataset: Dataset) -> str:
        """Return the error for a dataset without a snapshot.

        It is LOADING only while the service starts: clients treat that as a restart of the server, and reconnect.
        """
        if self._cache.is_starting:
            return f"LOADING {dataset.name} has not been loaded yet"
        return f"NOTLOADED {dataset.name} has not been loaded yet; CACHE.INFO {dataset.name} has its last attempt"

    def _to_read(self, name: bytes) -> tuple[Rows, Reads]:
        """Return the rows that `name` serves now, and the counts for reads of them.

        :raises CommandError: as `rows`; the error is counted.
        """
        try:
            return self.rows(name), self._datasets[name].counts.resp
        except CommandError:
            if (dataset := self._datasets.get(name)) is not None:
                if dataset.snapshot is None:
                    dataset.counts.resp.loading += 1
                else:
                    dataset.counts.resp.stale += 1
            raise

    def _dataset(self, name: bytes) -> Dataset:
        dataset = self._datasets.get(name)
        if dataset is None:
            raise CommandError(f"ERR unknown dataset '{_shown(name)}'")
        return dataset

    def _string(self, key: bytes) -> tuple[Rows, bytes]:
        """Return the rows of NAME and the KEY of a string key NAME:KEY.

        :raises CommandError: also for the key of a dataset itself, which is a hash.
        """
        name, colon, row = key.partition(b":")
        rows = self.rows(name)
        if not colon and row not in rows:
            raise CommandError(_WRONG_TYPE)
        return rows, row

    def _hash(self, key: bytes) -> Rows | None:
        """Return the rows of the hash `key`; None for NAME:KEY without a row."""
        name, colon, row = key.partition(b":")
        return _as_hash(self.rows(name), colon, row)

    def _hash_to_read(self, key: bytes) -> tuple[Rows | None, Reads]:
        """Return the rows of the hash `key`, and the counts for reads of it."""
        name, colon, row = key.partition(b":")
        rows, reads = self._to_read(name)
        return _as_hash(rows, colon, row), reads

    # Strings

    def hits(self, batch: Sequence[Words]) -> list[bytes]:
        """Return the replies of the leading GETs of `batch` that need no check.

        A GET that misses, or whose dataset must not be served at any age, ends the list. Most reads take this path, so
        it is inlined: see benchmarks/resp.py before you shorten it. Consecutive reads of a dataset are counted
        together.
        """
        answers: list[bytes] = []
        add = answers.append
        last = b":"  # no name contains it
        groups: Groups = []
        shards: Shards = []
        mask = counted = 0
        checksum = crc32
        reads: Reads
        try:
            for word, key in batch:
                if word != b"GET" and word != b"get":  # noqa: PLR1714  # a set would be hashed each time
                    break
                name, _, row = key.partition(b":")
                if name != last:
                    if answers:
                        number = len(answers)
                        reads.hits += number - counted  # noqa: F821  # bound with the first answer
                        counted = number
                    (shards, groups, mask, reads), last = self._served[name], name
                if shards:
                    add(shards[checksum(row) & mask][row])
                else:
                    place = checksum(row) & mask
                    add(groups[place >> PATCHED_GROUP_BITS][place & PATCHED_GROUP_MASK][row])
        except (KeyError, ValueError):
            pass  # no such dataset or row; more or fewer than two words
        if answers:
            reads.hits += len(answers) - counted
        return answers

    def uncount(self, batch: Sequence[Words]) -> None:
        """Undo the counts of `hits` for commands that will be answered again."""
        for _, key in batch:
            self._served[key.partition(b":")[0]][-1].hits -= 1

    def get(self, client: RespProtocol, words: Words) -> Reply:
        name, colon, row = words[1].partition(b":")
        rows, reads = self._to_read(name)
        found = rows.bulk(row)
        if found is None:
            if not colon:
                raise CommandError(_WRONG_TYPE)
            reads.misses += 1
            return reply.NIL[client.protocol]
        reads.hits += 1
        return found

    def mget(self, client: RespProtocol, words: Words) -> Reply:
        # All datasets are looked up before the first answer, so that all answers are from the same moment.
        nil = reply.NIL[client.protocol]
        sought = []
        moment: dict[bytes, tuple[Rows, Reads]] = {}
        for key in words[1:]:
            name, colon, row = key.partition(b":")
            if name not in moment:
                moment[name] = self._to_read(name)
            rows, reads = moment[name]
            # The key of a hash is nil, as in Redis.
            sought.append((rows if colon else None, reads, row))

        def some(part: Sequence[tuple[Rows | None, Reads, bytes]]) -> bytes:
            answers = [(rows and rows.bulk(row)) or nil for rows, _, row in part]
            if len(moment) == 1:
                _count(reads, answers, nil)
            else:
                for (_, of, _), answer in zip(part, answers, strict=True):
                    _count(of, [answer], nil)
            return b"".join(answers)

        return self._keeping(_in_slices(reply.array_header(len(sought)), sought, some), moment)

    def exists(self, _: RespProtocol, words: Words) -> Reply:
        keys = words[1:]
        if len(keys) <= CHUNK_ROWS:
            return reply.integer(sum(self._kind(key) != "none" for key in keys))
        moment: dict[bytes, Rows] = {}
        for key in keys:
            name = key.partition(b":")[0]
            if name not in moment:
                moment[name] = self.rows(name)

        def some() -> Iterator[bytes]:
            found = 0
            for start in range(0, len(keys), _KEYS_PER_TURN):
                for key in keys[start : start + _KEYS_PER_TURN]:
                    name, colon, row = key.partition(b":")
                    found += not colon or row in moment[name]
                yield b""
            yield reply.integer(found)

        return some()

    def strlen(self, _: RespProtocol, words: Words) -> Reply:
        rows, row = self._string(words[1])
        return reply.integer(len(rows.get(row) or b""))

    def type(self, _: RespProtocol, words: Words) -> Reply:
        return b"+%b\r\n" % self._kind(words[1]).encode()

    def _kind(self, key: bytes) -> str:
        name, colon, row = key.partition(b":")
        rows = self.rows(name)
        if not colon:
            return "hash"
        return "string" if row in rows else "none"

    def ttl(self, _: RespProtocol, words: Words) -> Reply:
        left_s = self._left_s(words[1])
        return reply.integer(-2 if left_s is None else round(left_s))

    def pttl(self, _: RespProtocol, words: Words) -> Reply:
        left_s = self._left_s(words[1])
        return reply.integer(-2 if left_s is None else round(left_s * 1000))

    def _left_s(self, key: bytes) -> float | None:
        """Return the seconds until the dataset of `key` expires, at least 0.

        Return None if the key does not exist.
        """
        if self._kind(key) == "none":
            return None
        dataset = self._dataset(key.partition(b":")[0])
        return max(0.0, dataset.settings.max_age_s - (dataset.age_s() or 0.0))

    # Hashes

    def hget(self, client: RespProtocol, words: Words) -> Reply:
        rows, reads = self._hash_to_read(words[1])
        nil = reply.NIL[client.protocol]
        answer = (rows and rows.bulk(words[2])) or nil
        _count(reads, [answer], nil)
        return answer

    def hmget(self, client: RespProtocol, words: Words) -> Reply:
        (rows, reads), fields = self._hash_to_read(words[1]), words[2:]
        nil = reply.NIL[client.protocol]

        def some(part: Words) -> bytes:
            answers = [(rows and rows.bulk(field)) or nil for field in part]
            _count(reads, answers, nil)
            return b"".join(answers)

        return self._keeping(_in_slices(reply.array_header(len(fields)), fields, some), [_name_in(words[1])])

    def hgetall(self, client: RespProtocol, words: Words) -> Reply:
        rows = self._whole_hash(words[1])
        header = reply.map_header(len(rows) if rows else 0, client.protocol)
        if not rows:
            return header
        return self._keeping(chain([header], reply.pairs(rows.slices(CHUNK_ROWS))), [words[1]])

    def hkeys(self, _: RespProtocol, words: Words) -> Reply:
        rows = self._whole_hash(words[1])
        header = reply.array_header(len(rows) if rows else 0)
        if not rows:
            return header
        pieces = (b"".join(map(bulk, keys)) for keys, _ in rows.slices(CHUNK_ROWS))
        return self._keeping(chain([header], pieces), [words[1]])

    def hvals(self, _: RespProtocol, words: Words) -> Reply:
        rows = self._whole_hash(words[1])
        header = reply.array_header(len(rows) if rows else 0)
        if not rows:
            return header
        pieces = (b"".join(documents) for _, documents in rows.slices(CHUNK_ROWS))
        return self._keeping(chain([header], pieces), [words[1]])

    def hexists(self, _: RespProtocol, words: Words) -> Reply:
        rows = self._hash(words[1])
        return reply.integer(rows is not None and words[2] in rows)

    def hlen(self, _: RespProtocol, words: Words) -> Reply:
        return reply.integer(len(self._hash(words[1]) or ()))

    def hstrlen(self, _: RespProtocol, words: Words) -> Reply:
        rows = self._hash(words[1])
        return reply.integer(len((rows.get(words[2]) if rows is not None else None) or b""))

    def _whole_hash(self, key: bytes) -> Rows | None:
        """Return the rows of the hash `key`, and count it as one read."""
        rows, reads = self._hash_to_read(key)
        if rows is None:
            reads.misses += 1
        else:
            reads.hits += 1
        return rows

    # Scans

    def scan(self, _: RespProtocol, words: Words) -> Reply:
        """Scan datasets by their numbers: for each, its hash and then its rows.

        MATCH and TYPE filter the result; keys that they drop count towards COUNT.
        """
        cursor = _cursor(words[1])
        options = _scan_options(words[2:], types=True)
        number, place = divmod(cursor, END_OF_DATASET)
        matches = glob(options.match)
        if self._numbered is None:
            self._numbered = numbered(self._datasets)
        datasets = self._numbered
        index = bisect_left(datasets, (number, b""))
        if index < len(datasets) and datasets[index][0] != number:
            place = 0  # the dataset of the cursor has been removed
        found: list[bytes] = []
        looked_at = 0
        while index < len(datasets) and looked_at < options.count:
            name = datasets[index][1]
            snapshot = self._datasets[name].snapshot
            if snapshot is None or options.type not in (None, b"string", b"hash"):
                index, place = index + 1, 0
                continue
            if place == 0 and options.type != b"string" and (matches is None or matches(name)):
                found.append(name)
            looked_at += place == 0
            if options.type == b"hash":
                place = END_OF_DATASET
            else:
                wanted = max(1, options.count - looked_at)
                place, keys = scan_rows(snapshot.rows, place, wanted, self._sorted)
                looked_at += len(keys)
                full = [b"%b:%b" % (name, key) for key in keys]
                found += full if matches is None else filter(matches, full)
            if place == END_OF_DATASET:
                index, place = index + 1, 0
        following = 0 if index >= len(datasets) else datasets[index][0] * END_OF_DATASET + place
        return _in_a_turn(reply.encode([str(following), found], 2), looked_at)

    def hscan(self, _: RespProtocol, words: Words) -> Reply:
        rows = self._whole_hash(words[1])
        cursor = _cursor(words[2])
        options = _scan_options(words[3:], types=False)
        if rows is None or cursor >= END_OF_DATASET:
            return reply.encode(["0", []], 2)
        place, keys = scan_rows(rows, cursor, options.count, self._sorted)
        matches = glob(options.match)
        wanted = keys if matches is None else list(filter(matches, keys))
        found = list(chain.from_iterable((key, rows.get(key) or b"") for key in wanted))
        return _in_a_turn(reply.encode([str(0 if place == END_OF_DATASET else place), found], 2), len(keys))

    def dbsize(self, _: RespProtocol, __: Words) -> Reply:
        return reply.integer(self._key_count())

    def _key_count(self) -> int:
        loaded = [dataset.snapshot.rows for dataset in self._datasets.values() if dataset.snapshot]
        return sum(len(rows) + 1 for rows in loaded)

    # The connection and the server

    def echo(self, _: RespProtocol, words: Words) -> Reply:
        return bulk(words[1])

    def select(self, _: RespProtocol, words: Words) -> Reply:
        if _int(words[1]) != 0:
            raise CommandError("ERR DB index is out of range")
        return reply.OK

    def accepts(self, user: bytes, password: bytes) -> bool:
        """Return True if a client may read as `user`.

        The time of the comparison does not depend on the password.
        """
        right = hmac.compare_digest(password, self._password)
        return right and user == b"default"

    def replace_password(self, password: str) -> None:
        """Accept only this password from now on. Authenticated clients remain so."""
        self._password = password.encode()

    @property
    def wants_password(self) -> bool:
        return bool(self._password)

    def info(self, client: RespProtocol, words: Words) -> Reply:
        known = self._info(client)
        wanted = {word.decode("utf-8", "replace").lower() for word in words[1:]} or {"default"}
        everything = wanted & {"default", "all", "everything"}
        sections = [
            "\r\n".join([f"# {title}", *(f"{name}:{value}" for name, value in fields.items()), ""])
            for title, fields in known.items()
            if everything or title.lower() in wanted
        ]
        return bulk("\r\n".join(sections).encode())

    def _info(self, client: RespProtocol) -> dict[str, dict[str, object]]:
        factory, cache = client.factory, self._cache
        uptime_s = int(cache.now() - cache.started_at)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        used_bytes = _resident_bytes()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        left_ms = [
            max(0.0, each.settings.max_age_s - (each.age_s() or 0.0)) * 1000
            for each in self._datasets.values()
            if each.snapshot
        ]
        keys = self._key_count()
        keyspace = {"db0": f"keys={keys},expires={keys},avg_ttl={int(sum(left_ms) / len(left_ms))}"} if left_ms else {}
        return {
            "Server": {
                "redis_version": REDIS_VERSION,
                "redis_mode": "standalone",
                "server_name": "cacheservice",
                "cacheservice_version": __version__,
                "os": f"{platform.system()} {platform.release()} {platform.machine()}",
                "arch_bits": 64,
                "process_id": os.getpid(),
                "tcp_port": client.transport.getHost().port,
                "server_time_usec": int(time.time() * 1e6),
                "uptime_in_seconds": uptime_s,
                "uptime_in_days": uptime_s // 86400,
            },
            "Clients": {
                "connected_clients": len(factory.clients),
                "maxclients": factory.max_connections,
                "blocked_clients": sum(each.waiting for each in factory.clients),
            },
            "Memory": {
                "used_memory": used_bytes,
                "used_memory_human": f"{used_bytes / 2**20:.2f}M",
                "used_memory_rss": used_bytes,
                "used_memory_peak": peak_bytes,
                "used_memory_peak_human": f"{peak_bytes / 2**20:.2f}M",
                "used_memory_dataset": sum(d.snapshot.rows.size_bytes for d in self._datasets.values() if d.snapshot),
                "maxmemory": 0,
                "maxmemory_human": "0B",
                "maxmemory_policy": "noeviction",
            },
            "Persistence": {"loading": 0, "rdb_bgsave_in_progress": 0, "aof_enabled": 0},
            "Stats": {
                "total_connections_received": factory.connections_received,
                "total_commands_processed": factory.commands_processed,
                "rejected_connections": factory.rejected["too_many_connections"],
                "expired_keys": 0,
                "evicted_keys": 0,
                "pubsub_channels": len(factory.subscribers),
            },
            "Replication": {"role": "master", "connected_slaves": 0},
            "CPU": {
                "used_cpu_sys": f"{usage.ru_stime:.6f}",
                "used_cpu_user": f"{usage.ru_utime:.6f}",
            },
            "Cluster": {"cluster_enabled": 0},
            "Keyspace": keyspace,
        }

    def command(self, client: RespProtocol, words: Words) -> Reply:
        known = self.catalogue["commands"]
        if len(words) == 1:
            return reply.encode([self._entry(name) for name in known], client.protocol)
        subcommand = words[1].lower()
        names = [word.decode("utf-8", "replace").lower() for word in words[2:]]
        if subcommand == b"count":
            if names:
                raise CommandError("ERR wrong number of arguments for 'command|count' command")
            return reply.integer(len(known))
        if subcommand == b"docs":
            docs = {name: known[name]["docs"] for name in names or known if name in known}
            return reply.encode(docs, client.protocol)
        if subcommand == b"info":
            entries = [self._entry(name) if name in known else None for name in names or known]
            return reply.encode(entries, client.protocol)
        if subcommand == b"list":
            return reply.encode(list(known), client.protocol)
        raise _unknown_subcommand("COMMAND", words[1])

    def _entry(self, name: str) -> list[object]:
        of = self.catalogue["commands"][name]
        return [name, of["arity"], of["flags"], *of["keys"], of["categories"], [], [], []]

    def client(self, client: RespProtocol, words: Words) -> Reply:
        subcommand, arguments = words[1].lower(), words[2:]
        match subcommand, arguments:
            case b"id", []:
                return reply.integer(client.id)
            case b"getname", []:
                return bulk(client.name) if client.name else reply.NIL[client.protocol]
            case b"setname", [name]:
                client.set_name(name)
                return reply.OK
            case b"setinfo", [attribute, value]:
                client.set_library(attribute.lower(), value)
                return reply.OK
            case b"info", []:
                return bulk(client.describe() + b"\n")
            case b"list", _:
                return bulk(b"".join(each.describe() + b"\n" for each in client.factory.clients))
            case ((b"no-evict" | b"no-touch"), [switch]) if switch.lower() in (b"on", b"off"):
                return reply.OK
        if subcommand in (b"id", b"getname", b"setname", b"setinfo", b"info", b"no-evict", b"no-touch"):
            raise CommandError(f"ERR wrong number of arguments for 'client|{subcommand.decode()}' command")
        raise _unknown_subcommand("CLIENT", words[1])

    # Commands that Redis does not have

    def cache_list(self, client: RespProtocol, _: Words) -> Reply:
        return reply.encode(list(self._cache.datasets), client.protocol)

    def cache_info(self, client: RespProtocol, words: Words) -> Reply:
        return reply.encode(as_json.dataset(collect.dataset(self._dataset(words[1]))), client.protocol)

    def cache_age(self, client: RespProtocol, words: Words) -> Reply:
        self.rows(words[1])
        return reply.encode(round(self._dataset(words[1]).age_s() or 0.0, 3), client.protocol)

    def cache_wait(self, client: RespProtocol, words: Words) -> Reply:
        """Wait until the snapshot includes a transaction.

        It blocks only its connection. Within MULTI it does not wait, like the blocking commands of Redis.
        """
        dataset = self._dataset(words[1])
        transaction_id, timeout_ms = _int(words[2]), _int(words[3])
        if transaction_id < 0 or not 0 <= timeout_ms <= _MAX_WAIT_MS:
            raise CommandError("ERR XID and TIMEOUT_MS must not be negative, and TIMEOUT_MS at most a day")
        if client.in_transaction:
            snapshot = dataset.snapshot
            present = self._cache.database.server
            return reply.integer(snapshot is not None and snapshot.includes(transaction_id, present))
        timeout_s = timeout_ms / 1000
        included = Deferred.fromCoroutine(self._freshness.includes(dataset, transaction_id, timeout_s))
        included.addErrback(_refuse_unknown)
        return included.addCallback(lambda yes: reply.integer(int(yes)))


@dataclass(frozen=True, slots=True)
class _ScanOptions:
    match: bytes = b"*"
    count: int = 10
    type: bytes | None = None


def _scan_options(words: Words, *, types: bool) -> _ScanOptions:
    match, count, kind = b"*", 10, None
    if len(words) % 2:
        raise CommandError(SYNTAX)
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option.lower() == b"match":
            match = value
        elif option.lower() == b"count":
            count = _int(value)
            if count < 1:
                raise CommandError(SYNTAX)
        elif option.lower() == b"type" and types:
            kind = value.lower()
        else:
            raise CommandError(SYNTAX)
    return _ScanOptions(match, min(count, MAX_COUNT), kind)


def _as_hash(rows: Rows, colon: bytes, row: bytes) -> Rows | None:
    """Return the rows if the key is NAME; None if it is NAME:KEY without a row.

    :raises CommandError: if NAME:KEY is a row, which is a string.
    """
    if not colon:
        return rows
    if row in rows:
        raise CommandError(_WRONG_TYPE)
    return None


def _count(reads: Reads, answers: Sequence[bytes], nil: bytes) -> None:
    missed = answers.count(nil)
    reads.misses += missed
    reads.hits += len(answers) - missed


def _cursor(word: bytes) -> int:
    if not word.isdigit() or len(word) > 20 or int(word) >= 1 << 64:
        raise CommandError("ERR invalid cursor")
    return int(word)


def _int(word: bytes) -> int:
    number = integer(word)
    if number is None:
        raise CommandError(_NOT_AN_INTEGER)
    return number


def _name_in(key: bytes) -> bytes:
    return key.partition(b":")[0]


def _in_slices(header: bytes, items: Sequence[T], some: Callable[[Sequence[T]], bytes]) -> bytes | Iterator[bytes]:
    """Return the header and the encoded items, in one piece if they are few.

    :param some: encodes a slice of the items.
    """
    if len(items) <= CHUNK_ROWS:
        return header + some(items)
    return chain([header], (some(items[start : start + CHUNK_ROWS]) for start in range(0, len(items), CHUNK_ROWS)))


def _in_a_turn(answer: bytes, looked_at: int) -> Reply:
    """Return a slow answer as an iterator, which ends its client's turn.

    Otherwise a pipeline of such commands would block the reactor.
    """
    return answer if looked_at <= CHUNK_ROWS else iter([answer])


def _flags_as_statuses(fields: dict[str, Any]) -> dict[str, Any]:
    """Send flags as statuses, as Redis does; redis-cli exits on any other type."""
    return fields | {name: frozenset(map(reply.Status, fields[name])) for name in _FLAGS & fields.keys()}


def _refuse_unknown(failure: Failure) -> None:
    """Raise an error for a dataset that was removed during the wait."""
    failure.trap(UnknownDataset)
    raise CommandError(f"ERR {failure.value}")


def _shown(name: bytes) -> str:
    return name[:64].decode("utf-8", "replace")


def _unknown_subcommand(command: str, word: bytes) -> CommandError:
    return CommandError(f"ERR unknown subcommand '{_shown(word)}'. Try {command} HELP.")


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _commands() -> list[Command]:
    return [
        Command("get", Commands.get, 2, 2),
        Command("mget", Commands.mget, 2),
        Command("exists", Commands.exists, 2),
        Command("strlen", Commands.strlen, 2, 2),
        Command("type", Commands.type, 2, 2),
        Command("ttl", Commands.ttl, 2, 2),
        Command("pttl", Commands.pttl, 2, 2),
        Command("scan", Commands.scan, 2),
        Command("dbsize", Commands.dbsize, 1, 1),
        Command("hget", Commands.hget, 3, 3),
        Command("hmget", Commands.hmget, 3),
        Command("hgetall", Commands.hgetall, 2, 2),
        Command("hexists", Commands.hexists, 3, 3),
        Command("hlen", Commands.hlen, 2, 2),
        Command("hkeys", Commands.hkeys, 2, 2),
        Command("hvals", Commands.hvals, 2, 2),
        Command("hstrlen", Commands.hstrlen, 3, 3),
        Command("hscan", Commands.hscan, 3),
        Command("echo", Commands.echo, 2, 2),
        Command("select", Commands.select, 2, 2),
        Command("info", Commands.info, 1),
        Command("command", Commands.command, 1),
        Command("client", Commands.client, 2),
        Command("cache.list", Commands.cache_list, 1, 1),
        Command("cache.info", Commands.cache_info, 2, 2),
        Command("cache.age", Commands.cache_age, 2, 2),
        Command("cache.wait", Commands.cache_wait, 4, 4),
    ]
