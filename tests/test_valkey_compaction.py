"""Chains of deltas in a real Valkey: they are made shorter while deltas are published, and nobody notices."""

from __future__ import annotations

import os
from collections.abc import Iterable

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from cacheservice.cache.events import Event, Published
from cacheservice.replication.valkey import compactor
from cacheservice.replication.valkey.chains import KEPT_DELTAS, MERGED_DELTAS
from cacheservice.replication.valkey.errors import ValkeyRefused
from cacheservice.replication.valkey.manifest import Member, Piece
from cacheservice.replication.valkey.store import Store
from tests.kit.datasets import numbered_rows, rows_of
from tests.kit.machines import Machine
from tests.kit.valkey import ValkeyServer, running_valkey
from tests.kit.waiting import until

_LARGE_BYTES = 200_000
"""Of a document: more than half of the snapshot, which then takes the place of the delta."""


class HeldStore(Store):
    """Holds each piece that is written in the background until it is released.

    `held` has a Deferred for each piece: callback to return the piece, errback to fail.
    """

    held: list[Deferred[None]]
    is_holding = False

    async def write(self, generation: int, base: int, frames: Iterable[bytes], pause_s: float = 0.0) -> Piece:
        piece = await super().write(generation, base, frames, pause_s)
        if pause_s and self.is_holding:
            release: Deferred[None] = Deferred()
            self.held.append(release)
            try:
                await release
            except BaseException:
                self.forget(piece)
                raise
        return piece


class Compaction(TestCase):
    timeout = 120

    async def leader(self, server: ValkeyServer) -> tuple[Machine, HeldStore]:
        """A leader whose work in the background is held, and which has published a snapshot of each dataset."""
        leader = Machine(self, server, "leader", store=HeldStore)
        store = leader.store
        assert isinstance(store, HeldStore)
        store.held, store.is_holding = [], True
        leader.serve("products", numbered_rows(40_000))
        leader.serve("prices", numbered_rows(5))
        await leader.lead()
        await leader.published("prices")
        return leader, store

    async def with_snapshot(self, leader: Machine, store: HeldStore) -> Member:
        """Publish a delta so large that a snapshot is written in the background, and is held; the member."""
        leader.change("products", b"1", os.urandom(_LARGE_BYTES))
        member = await leader.published("products")
        await until(lambda: bool(store.held))
        return member

    async def shortened(self, leader: Machine) -> Member:
        """Wait until the chain of the products begins with another snapshot than the first."""
        while (member := await leader.published("products")).snapshot.generation == 1:
            await deferLater(reactor, 0.001)
        return member

    async def test_deltas_while_a_snapshot_is_written(self) -> None:
        """They arrive before it is complete; then it takes the place of the pieces before its generation."""
        with running_valkey() as server:
            leader, store = await self.leader(server)
            replica, late = Machine(self, server, "replica"), Machine(self, server, "late")
            await replica.follow(leader)
            before = await self.with_snapshot(leader, store)
            self.assertEqual((before.snapshot.generation, len(before.deltas)), (1, 1))
            for number in range(3):
                leader.change("products", b"2", b"%d" % number)
                leader.change("prices", b"3", b"%d" % number)
                await replica.follow(leader)
            self.assertEqual(replica.moments[-1], (5, 4))
            self.assertEqual((await leader.published("products")).snapshot, before.snapshot)
            moments = list(replica.moments)
            store.held.pop().callback(None)
            after = await self.shortened(leader)
            self.assertEqual(after.snapshot.generation, before.generation)
            self.assertEqual([delta.generation for delta in after.deltas], [3, 4, 5])
            await replica.follow(leader)
            leader.change("products", b"2", None)
            await replica.follow(leader)
            self.assertEqual(replica.moments, [*moments, (6, 4)])
            await late.follow(leader)
            self.assertEqual(late.moments, [(6, 0), (6, 4)])
            for piece in before.pieces:  # replicas may be loading them
                self.assertIn(int(server.cli("PTTL", store.names.chunk(piece, 0).decode())), range(60_001))
            self.assertEqual((leader.log.lines, replica.log.lines, late.log.lines), ([], [], []))

    async def test_small_deltas_are_merged(self) -> None:
        """The newest stay single. A replica that is late by fewer gets deltas, one that is later the snapshot."""
        with running_valkey() as server:
            leader, store = await self.leader(server)
            store.is_holding = False
            much_later, later, late = (Machine(self, server, name) for name in ("much later", "later", "late"))
            longest = 0
            for number in range(3 * KEPT_DELTAS):
                if number == 5:
                    await much_later.follow(leader)
                if number == 3 * KEPT_DELTAS - KEPT_DELTAS // 2:
                    await later.follow(leader)
                key = b"%d" % (number % 7)
                leader.change("products", key, None if number % 3 == 1 and key in leader.rows("products") else key)
                leader.change("products", b"new %d" % (number % 5), b"%d" % number)
                longest = max(longest, len((await leader.published("products")).deltas))
            self.assertLessEqual(longest, KEPT_DELTAS + 2 * MERGED_DELTAS)
            seen: list[Event] = []
            for machine in (much_later, later, late):
                machine.cache.events.subscribe(seen.append, Published)
                await machine.follow(leader)
            followed = [event.delta for event in seen if isinstance(event, Published) and event.dataset == "products"]
            self.assertEqual([delta is None for delta in followed], [True, False, True])
            self.assertEqual(leader.log.lines, [])

    async def test_work_that_has_become_useless(self) -> None:
        """A snapshot that is published meanwhile ends the work, and what it has written is deleted."""
        with running_valkey() as server:
            leader, store = await self.leader(server)
            before = await self.with_snapshot(leader, store)
            keys = set(server.cli("KEYS", "*").split("\n"))
            unnamed = keys - {store.names.chunk(piece, 0).decode() for piece in before.pieces}
            leader.serve("products", rows_of({b"1": b"one"}))
            self.assertEqual((await leader.published("products")).pieces[0].generation, 3)
            self.assertTrue(store.held[0].called)  # cancelled
            written = [key for key in unnamed if key.startswith("cs:{group/shop}:") and "head" not in key]
            await until(lambda: len(set(server.cli("KEYS", "*").split("\n")) & set(written)) == 1)  # that of the prices
            replica = Machine(self, server, "replica")
            await replica.follow(leader)
            self.assertEqual(leader.log.lines, [])

    async def test_failures(self) -> None:
        """A failure is logged, deltas go on, and the work begins again later."""
        self.patch(compactor, "_RETRY_S", 0.01)
        with running_valkey() as server:
            leader, store = await self.leader(server)
            replica = Machine(self, server, "replica")
            await self.with_snapshot(leader, store)
            store.held.pop().errback(ValkeyRefused("the server is full", "OOM"))
            leader.change("products", b"2", b"two")
            await replica.follow(leader)
            self.assertEqual(leader.log.names(), ["compaction_failed"])
            number = 0
            while not store.held:
                number += 1
                leader.change("products", b"2", b"%d" % number)
                await leader.published("products")
            store.held.pop().callback(None)
            await self.shortened(leader)
            await replica.follow(leader)
            self.assertEqual(leader.log.names(), ["compaction_failed"])
            assert leader.publisher is not None
            self.assertIsNone(leader.publisher.problem)

    async def test_a_server_that_loses_everything(self) -> None:
        """What was written in the background is not there any more; all rows are published again."""
        with running_valkey() as server:
            leader, store = await self.leader(server)
            await self.with_snapshot(leader, store)
            server.cli("FLUSHALL")
            store.held.pop().callback(None)
            replica = Machine(self, server, "replica")
            await replica.follow(leader)
            self.assertEqual(len((await leader.published("products")).pieces), 1)
            self.assertEqual(leader.log.names(), ["publish_failed"])

    async def test_a_lead_that_ends(self) -> None:
        """A piece of a leader that was fenced meanwhile is never named."""
        with running_valkey() as server:
            leader, store = await self.leader(server)
            await self.with_snapshot(leader, store)
            second = Machine(self, server, "second")
            await second.follow(leader)
            lead = await second.lead()
            second.change("products", b"2", b"of the second")
            await second.published("products")
            store.held.pop().callback(None)
            await until(lambda: bool(leader.fenced))
            current = await second.store.current()
            assert current is not None
            assert lead.manifest is not None
            self.assertEqual(current.epoch, lead.epoch)
            self.assertEqual(current.members["products"].snapshot, lead.manifest.members["products"].snapshot)
            self.assertEqual(leader.log.names(), ["lead_fenced"])
