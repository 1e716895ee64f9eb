"""The generations of one unit in a Valkey, and the one step that makes another one current.

The pieces of a generation are written under new names first. Then a script makes the manifest that names them current,
unless the writer's lead is over: the hash of the unit has the epoch of the newest lead, so a leader that was suspended
and wakes up is refused, however late its command arrives (a fencing token). The script also checks that the manifest
follows the one that the writer knows, and that all pieces are there, because a failover may lose acknowledged writes.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from cacheservice.base.errors import CacheServiceError, SnapshotRejected
from cacheservice.base.interfaces import Clock
from cacheservice.base.tasks import abandon
from cacheservice.base.text import printable
from cacheservice.base.timers import pause
from cacheservice.replication.valkey.client import Valkey
from cacheservice.replication.valkey.manifest import Manifest, Names, Piece, from_bytes

CHUNK_BYTES = 512 * 1024
_AHEAD = 2
"""Parts that are requested while one is applied. More would have to wait for one another on a slow network, and each
reply has two seconds."""
_UNPUBLISHED_S = 600.0
"""How long the server keeps parts that are not published: those of a writer that failed must not fill it."""

_TAKE_LEAD = """
local epoch = math.max(tonumber(redis.call('HGET', KEYS[1], 'epoch') or 0) + 1, tonumber(ARGV[1]))
redis.call('HSET', KEYS[1], 'epoch', string.format('%.0f', epoch), 'leader', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {string.format('%.0f', epoch), redis.call('HGET', KEYS[1], 'manifest')}
"""
_PUBLISH = """
local head = redis.call('HMGET', KEYS[1], 'epoch', 'moment')
if tonumber(head[1] or 0) > tonumber(ARGV[1]) then return {'fenced', head[1]} end
if tonumber(head[2] or 0) ~= tonumber(ARGV[2]) then return {'overtaken', head[2] or '0'} end
for number = 2, #KEYS do
  if redis.call('PEXPIRE', KEYS[number], ARGV[6]) == 0 then return {'missing', KEYS[number]} end
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'moment', ARGV[3], 'manifest', ARGV[4], 'leader', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PUBLISH', ARGV[7], ARGV[3])
return {'published', ARGV[3]}
"""
_LEAVE = """
if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'leader')
  redis.call('PUBLISH', ARGV[2], 'left')
end
"""
_EXPIRE = """
for number = 1, #KEYS do redis.call('PEXPIRE', KEYS[number], ARGV[1]) end
"""
_ASK = """
for number = 2, #ARGV, 2 do
  local field = 'least:' .. ARGV[number]
  if tonumber(redis.call('HGET', KEYS[1], field) or 0) < tonumber(ARGV[number + 1]) then
    redis.call('HSET', KEYS[1], field, ARGV[number + 1])
  end
end
redis.call('HINCRBY', KEYS[1], 'asked', 1)
redis.call('PUBLISH', ARGV[1], 'asked')
"""
_CLOCK = """
local time = redis.call('TIME')
return {string.match(redis.call('INFO', 'server'), 'run_id:(%x+)') or '', time[1], time[2]}
"""


class Fenced(CacheServiceError):
    """Another process has taken the lead since; `epoch` is that of its lead. Stop publishing."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"another process has the lead, epoch {epoch}")
        self.epoch = epoch


class Overtaken(CacheServiceError):
    """The unit is not at the moment that the writer knows, or pieces are missing. Read it, and publish a snapshot."""


class Lead(NamedTuple):
    """A lead of a unit.

    :param epoch: greater than that of every lead before.
    :param manifest: what is current; None if nothing is.
    """

    epoch: int
    manifest: Manifest | None


class Leader(NamedTuple):
    """The process that has begun the newest lead, by its name for people."""

    name: str
    epoch: int


class Asked(NamedTuple):
    """What replicas ask the leader for.

    :param times: changes when they want a refresh.
    :param least: the generation that each dataset must exceed before all replicas can follow it.
    """

    times: int
    least: dict[str, int]


class ServerClock(NamedTuple):
    """The clock of a server: its run, and microseconds since 1970. Clocks of different runs cannot be compared."""

    run: str
    now_us: int


class Store:
    """Reads and writes one unit.

    `leader` is the one that the last read or write has found; None if there was none.

    :param clock: `IReactorTime`.
    :param keep_s: how long the server keeps the current generation without a publish.
    """

    def __init__(self, valkey: Valkey, names: Names, clock: Clock, keep_s: float = 86_400.0) -> None:
        self.names = names
        self.leader: Leader | None = None
        self.keep_s = keep_s
        self._valkey = valkey
        self._clock = clock
        self._keep_ms = int(keep_s * 1000)

    async def take_lead(self, leader: str, least_epoch: int) -> Lead:
        """Begin a lead: from now on no other process can publish, except one that takes the lead later.

        :param leader: the name of this process, for people.
        :param least_epoch: greater than that of every lead that this process knows of; the wall clock in milliseconds
            is usual, because the server may lose the epochs that it had.
        :raises ValkeyDown: if no server answers.
        :raises ValkeyRefused: if it refuses.
        """
        head = self.names.head
        epoch, manifest = await self._valkey.run(head, "EVAL", _TAKE_LEAD, 1, head, least_epoch, leader, self._keep_ms)
        self.leader = Leader(leader, int(epoch))
        return Lead(int(epoch), None if manifest is None else self._manifest(manifest))

    async def write(self, generation: int, base: int, frames: Iterable[bytes], pause_s: float = 0.0) -> Piece:
        """Write frames as a piece that nothing names yet; it expires unless a manifest is published that names it.

        :param frames: one piece of bytes is written in each turn of the reactor.
        :param pause_s: between two turns.
        """
        token = secrets.token_hex(8)
        piece, waiting = Piece(generation, base, token, 0, 0), bytearray()
        try:
            for data in frames:
                waiting += data
                await pause(self._clock, pause_s)
                while len(waiting) >= CHUNK_BYTES:
                    piece = await self._write_chunk(piece, bytes(waiting[:CHUNK_BYTES]))
                    del waiting[:CHUNK_BYTES]
            return await self._write_chunk(piece, bytes(waiting)) if waiting else piece
        except (CacheServiceError, CancelledError):
            self.forget(replace(piece, chunks=piece.chunks + 1))  # the last part may be on its way
            raise

    async def _write_chunk(self, piece: Piece, data: bytes) -> Piece:
        key = self.names.chunk(piece, piece.chunks)
        await self._valkey.run(key, "SET", key, data, "PX", int(_UNPUBLISHED_S * 1000))
        return Piece(piece.generation, piece.base, piece.token, piece.chunks + 1, piece.size_bytes + len(data))

    async def publish(self, manifest: Manifest, after: int, leader: str) -> None:
        """Make a manifest current in one step.

        :param after: the moment of the manifest that it follows; 0 if there was none.
        :raises Fenced: if another process has taken the lead.
        :raises Overtaken: if another manifest is current, or a piece is missing.
        """
        head = self.names.head
        keys = [head, *(key for piece in manifest.pieces for key in self.names.chunks(piece))]
        words = (manifest.epoch, after, manifest.moment, manifest.to_bytes(), leader, self._keep_ms, self.names.channel)
        outcome, value = await self._valkey.run(head, "EVAL", _PUBLISH, len(keys), *keys, *words)
        if outcome == b"fenced":
            raise Fenced(int(value))
        if outcome != b"published":
            raise Overtaken(f"{head.decode()}: {outcome.decode()}: {value.decode()}")

    async def expire(self, pieces: Iterable[Piece], after_s: float) -> None:
        """Let pieces expire after so many seconds: soon if no manifest names them any more, later if one still does."""
        keys = [key for piece in pieces for key in self.names.chunks(piece)]
        if keys:
            await self._valkey.run(keys[0], "EVAL", _EXPIRE, len(keys), *keys, int(after_s * 1000))

    def forget(self, piece: Piece) -> None:
        """Delete a piece that was written in vain, if the server can be reached; otherwise it expires."""
        Deferred.fromCoroutine(self.expire([piece], 0)).addErrback(_ignored)

    def leave(self, epoch: int) -> None:
        """Note that this lead has no leader any more, if the server can be reached."""
        head = self.names.head
        left = self._valkey.run(head, "EVAL", _LEAVE, 1, head, epoch, self.names.channel)
        Deferred.fromCoroutine(left).addErrback(_ignored)

    async def current(self) -> Manifest | None:
        """Return the current manifest; None if there is none.

        :raises SnapshotRejected: if something else is there.
        """
        head = self.names.head
        data, epoch, leader = await self._valkey.run(head, "HMGET", head, "manifest", "epoch", "leader")
        self.leader = _leader(epoch, leader)
        return None if data is None else self._manifest(data)

    async def read(self, pieces: Sequence[Piece]) -> AsyncGenerator[tuple[Piece, bytes]]:
        """Yield the parts of pieces; the next two are requested meanwhile. Close the generator in the end.

        :raises SnapshotRejected: if a part is missing, or a piece has another length; it has been superseded.
        """
        parts = ((piece, number) for piece in pieces for number in range(piece.chunks))
        ahead: deque[tuple[Piece, int, Deferred[object]]] = deque()
        size_bytes = 0
        try:
            while True:
                for piece, number in islice(parts, 1 + _AHEAD - len(ahead)):
                    ahead.append((piece, number, Deferred.fromCoroutine(self._part(piece, number))))
                if not ahead:
                    return
                piece, number, part = ahead.popleft()
                data = await part
                if not isinstance(data, bytes):
                    raise SnapshotRejected(f"{self.names.chunk(piece, number).decode()}: it is not there any more")
                size_bytes = len(data) + (size_bytes if number else 0)
                if number + 1 == piece.chunks and size_bytes != piece.size_bytes:
                    raise SnapshotRejected(
                        f"{self.names.head.decode()}: generation {piece.generation} has another length"
                    )
                yield piece, data
        finally:
            for _, _, part in ahead:
                abandon(part)

    async def _part(self, piece: Piece, number: int) -> object:
        key = self.names.chunk(piece, number)
        return await self._valkey.run(key, "GET", key)

    async def ask(self, least: Mapping[str, int]) -> None:
        """Ask the leader for a refresh, and for greater generations than these."""
        head, words = self.names.head, [word for pair in least.items() for word in pair]
        await self._valkey.run(head, "EVAL", _ASK, 1, head, self.names.channel, *words)

    async def asked(self, names: Sequence[str]) -> Asked:
        """Return what replicas have asked for."""
        head = self.names.head
        fields = [f"least:{name}" for name in names]
        count, *least = await self._valkey.run(head, "HMGET", head, "asked", *fields)
        asked = {name: int(value) for name, value in zip(names, least, strict=True) if value is not None}
        return Asked(int(count or 0), asked)

    async def clock(self) -> ServerClock:
        """Return the clock of the server that has the unit."""
        head = self.names.head
        run, seconds, microseconds = await self._valkey.run(head, "EVAL", _CLOCK, 1, head)
        return ServerClock(run.decode(), int(seconds) * 1_000_000 + int(microseconds))

    def _manifest(self, data: object) -> Manifest:
        name = self.names.head.decode()
        if not isinstance(data, bytes):
            raise SnapshotRejected(f"{name}: it is not a manifest of a cacheservice")
        return from_bytes(data, name)


def _ignored(failure: Failure) -> None:
    failure.trap(CacheServiceError, CancelledError)


def _leader(epoch: object, name: object) -> Leader | None:
    if not isinstance(epoch, bytes) or not epoch.isdigit() or not isinstance(name, bytes):
        return None
    return Leader(printable(name.decode(errors="replace")), int(epoch))
