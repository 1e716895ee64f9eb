"""A replica's side: serves in this process what the leader of a unit has published in a Valkey."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing

from twisted.internet.defer import Deferred

from cacheservice.base.errors import SnapshotRejected
from cacheservice.base.interfaces import Reactor
from cacheservice.base.tasks import abandon
from cacheservice.base.threads import in_thread
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.rows import Groups
from cacheservice.cache.snapshot import Snapshot
from cacheservice.replication.codec import Decoder, Head, Part, Unframer
from cacheservice.replication.follower import Follower
from cacheservice.replication.sender import RESEND
from cacheservice.replication.valkey.manifest import Manifest, Member, Piece
from cacheservice.replication.valkey.publisher import Here
from cacheservice.replication.valkey.store import ServerClock, Store
from cacheservice.sources.frames.clocks import ReadAt
from cacheservice.sources.frames.header import fingerprint

_THREADED_BYTES = 64 * 1024
"""The compressed size of a piece from which on a thread saves more time than it takes."""


class Replica:
    """Loads generations of a unit, one load at a time.

    `loaded` has the generation of each dataset that this process serves as the leader has published it. `newest` is the
    manifest that the Valkey had last; `manifest` the one whose generations were loaded last.

    :param names: of the unit's datasets.
    :param release: called with the groups of rows once they have no readers left.
    :param reactor: has threads, in which large pieces are decompressed.
    """

    def __init__(
        self, names: Sequence[str], store: Store, here: Here, release: Callable[[Groups], None], reactor: Reactor
    ) -> None:
        self.loaded: dict[str, int] = {}
        self.manifest: Manifest | None = None
        self.newest: Manifest | None = None
        self._seen: Callable[[], object] = lambda: None
        self._names = names
        self._store = store
        self._here = here
        self._release = release
        self._reactor = reactor

    def notify(self, seen: Callable[[], object]) -> None:
        """Call `seen` from now on when there is something new, before it is loaded."""
        self._seen = seen

    async def load(self) -> Mapping[str, int]:
        """Publish what is new, whole.

        Return the datasets whose generation in this process is later than the leader's, with that generation: the
        leader must publish a greater one before they can follow it again.

        :raises SnapshotRejected: if what is there cannot be applied; nothing has changed.
        :raises ValkeyDown: if no server answers; nothing has changed.
        """
        self.newest = manifest = await self._store.current()
        if manifest is None:
            self.manifest = None
            return {}
        if self.manifest == manifest and not any(dataset.redefined for dataset in self._datasets().values()):
            return {}
        self._seen()
        steps: dict[str, tuple[Member, Sequence[Piece]]] = {}
        ahead: dict[str, int] = {}
        for name, dataset in self._datasets().items():
            member = manifest.members.get(name)
            if member is None:
                continue
            _check_definition(dataset, member)
            served = self.loaded.get(name)
            if dataset.snapshot is None or served != dataset.snapshot.generation or dataset.redefined:
                served = None  # it serves something of its own
            if dataset.last_generation >= member.generation and served != member.generation:
                ahead[name] = dataset.last_generation
                continue
            since = None if served is None else member.since(served)
            steps[name] = (member, member.pieces if since is None else since)
        if ahead:
            return ahead
        try:
            await self._apply(manifest, steps)
        except SnapshotRejected:
            # Frames that do not follow what is served may follow nothing here; all rows do.
            self.loaded = {}
            raise
        self.loaded = {name: member.generation for name, (member, _) in steps.items()}
        self.manifest = manifest
        for dataset in self._datasets().values():
            if dataset.snapshot is not None and dataset.snapshot.server is not None:
                # Readers wait for transactions of the server that the leader reads.
                self._here.cache.database.seen(dataset.snapshot.server, dataset.snapshot.lag)
        return {}

    def _datasets(self) -> dict[str, Dataset]:
        """Return the unit's datasets that are declared."""
        declared = self._here.cache.datasets
        return {name: declared[name] for name in self._names if name in declared}

    def _served(self) -> dict[str, tuple[Snapshot | None, str]]:
        """Return what each dataset serves, and the fingerprint of its definition."""
        return {name: (each.snapshot, fingerprint(each.settings)) for name, each in self._datasets().items()}

    async def _apply(self, manifest: Manifest, steps: Mapping[str, tuple[Member, Sequence[Piece]]]) -> None:
        asked_at = self._here.clock.seconds()
        asking = Deferred.fromCoroutine(self._store.clock())  # its reply comes with the first frames
        server: ServerClock | None = None

        def read_at(head: Head) -> ReadAt:
            assert server is not None, "no frames are applied before"
            return self._read_at(manifest, asked_at, server, head)

        carrier = _Carrier()
        follower = Follower(self._here.cache, carrier, self._release, read_at, self._here.clock, self._here.log)
        before = self._served()
        try:
            for member, pieces in steps.values():
                async with aclosing(self._frames(pieces)) as frames:
                    async for some in frames:
                        server = server or await asking
                        await _applied(follower, some)
                        carrier.check()
                server = server or await asking
                await _applied(follower, member.renewal)
            carrier.check()
            now = self._served()
            if any(now.get(name) != before[name] for name in steps):
                raise SnapshotRejected("a dataset was published or redefined while the leader's rows were loaded")
            follower.commit()
        finally:
            abandon(asking)
            follower.stop()

    async def _frames(self, pieces: Sequence[Piece]) -> AsyncGenerator[bytes | list[Part]]:
        """Yield the frames of pieces. While those of a large piece are applied, a thread decompresses the next."""
        unframer = Unframer("the frames in the Valkey")
        cutting: Deferred[list[Part]] | None = None
        async with aclosing(self._store.read(pieces)) as parts:
            try:
                async for piece, data in parts:
                    if cutting is not None:
                        cut, cutting = await cutting, None
                    else:
                        cut = []
                    if piece.size_bytes < _THREADED_BYTES:
                        if cut:
                            yield cut
                        yield data
                        continue
                    cutting = Deferred.fromCoroutine(self._cut(unframer, data))
                    if cut:
                        yield cut
                if cutting is not None:
                    last, cutting = await cutting, None
                    yield last
            finally:
                if cutting is not None:
                    abandon(cutting)

    async def _cut(self, unframer: Unframer, data: bytes) -> list[Part]:
        try:
            return await in_thread(self._reactor, lambda: list(unframer.feed(data)))
        except SnapshotRejected as error:
            self._here.log.error("feed_broken", error=str(error))
            raise

    def _read_at(self, manifest: Manifest, asked_at: float, server: ServerClock, head: Head) -> ReadAt:
        """Return when rows were read, never later than they were.

        Both processes compare their own clocks with that of the server, which was read after `asked_at`.
        """
        member = manifest.members[head.header.dataset]
        if manifest.run != server.run:
            return self._here.clocks.read_at(head.header)
        return ReadAt(asked_at - (server.now_us - member.read_us) / 1e6, None)


def _check_definition(dataset: Dataset, member: Member) -> None:
    """:raises SnapshotRejected: if the leader has another definition of a dataset, whose rows must not be served."""
    name = dataset.name
    head = next(iter(Decoder(name).feed(member.renewal)), None)
    if not isinstance(head, Head) or head.header.fingerprint != fingerprint(dataset.settings):
        raise SnapshotRejected(
            f"{name}: the leader has another definition of it (the query, the key, the probe, watch, settings or "
            "search_path); reload the configuration of all processes"
        )


class _Carrier:
    """Takes what the follower sends to a sender: nothing but problems matter here."""

    def __init__(self) -> None:
        self._problem: str | None = None

    def send(self, name: str, /, **fields: str | int) -> None:
        if name == RESEND:
            self._problem = f"the frames of {fields['name']} do not follow what is served"

    def lose(self) -> None:
        self._problem = "the frames are damaged"

    def check(self) -> None:
        """:raises SnapshotRejected: if the frames could not be applied."""
        if self._problem is not None:
            raise SnapshotRejected(self._problem)


def _applied(follower: Follower, frames: bytes | list[Part]) -> Deferred[None]:
    """Apply frames; fire when that is done, or has failed."""
    applied: Deferred[None] = Deferred()
    if isinstance(frames, bytes):
        follower.received(frames)
    else:
        follower.cut(frames)
    follower.then(lambda: applied.callback(None))
    return applied
