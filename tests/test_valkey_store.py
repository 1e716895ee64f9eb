"""Generations in a real Valkey: written, made current in one step, read by others; and leaders that are late."""

from __future__ import annotations

import os
import signal
from contextlib import aclosing

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase

from cacheservice.base.errors import SnapshotRejected
from cacheservice.config.valkey_url import parse
from cacheservice.replication.valkey.client import Valkey
from cacheservice.replication.valkey.manifest import Manifest, Member, Names, Piece, from_bytes
from cacheservice.replication.valkey.store import CHUNK_BYTES, Fenced, Lead, Overtaken, Store
from tests.kit.valkey import ValkeyServer, running_cluster, running_valkey

LONG_S = 30.0
NAMES = Names("cs", "dataset/products")


class Stores(TestCase):
    timeout = 120

    def store(self, *servers: ValkeyServer, unit: str = NAMES.unit) -> Store:
        url = "redis://" + ",".join(server.address for server in servers)
        client = Valkey(parse(url), reactor, LONG_S)
        self.addCleanup(deferLater, reactor, 0.01)
        self.addCleanup(client.close)
        return Store(client, Names("cs", unit), reactor)

    async def publish(self, store: Store, lead: Lead, generation: int, data: bytes) -> Manifest:
        """Publish a snapshot after what is current."""
        before = await store.current()
        moment = before.moment if before is not None else 0
        piece = await store.write(generation, 0, [data])
        manifest = Manifest(lead.epoch, moment + 1, {"products": Member(piece)})
        await store.publish(manifest, moment, "me")
        return manifest

    async def data(self, store: Store, piece: Piece) -> bytes:
        return b"".join([part async for _, part in store.read([piece])])

    async def test_a_generation(self) -> None:
        """What one process publishes, another reads; pieces are cut into parts."""
        with running_valkey() as server:
            writer, reader = self.store(server), self.store(server)
            self.assertIsNone(await reader.current())
            lead = await writer.take_lead("me", 5)
            self.assertEqual(lead, Lead(5, None))
            frames = os.urandom(3 * CHUNK_BYTES + 17)
            manifest = await self.publish(writer, lead, 7, frames)
            found = await reader.current()
            self.assertEqual(found, manifest)
            (piece,) = manifest.pieces
            self.assertEqual((piece.chunks, piece.size_bytes), (4, len(frames)))
            self.assertEqual(await self.data(reader, piece), frames)
            self.assertGreater(int(server.cli("PTTL", writer.names.head.decode())), 80_000_000)

    async def test_parts_are_requested_ahead(self) -> None:
        """All parts of several pieces come in order, at most two of them too early; a reader may stop at any time."""
        with running_valkey() as server:
            store = self.store(server)
            contents = [os.urandom(size) for size in (2 * CHUNK_BYTES + 1, 3, 2 * CHUNK_BYTES, 5, 7)]
            pieces = [await store.write(number, 0, [data]) for number, data in enumerate(contents, 1)]
            async with aclosing(store.read(pieces)) as parts:
                read = dict.fromkeys(pieces, b"")
                number = 0
                async for piece, data in parts:
                    read[piece] += data
                    number += 1
                    requested = server.cli("INFO", "commandstats").split("cmdstat_get:calls=")[1].split(",")[0]
                    self.assertLessEqual(int(requested), number + 2)
            self.assertEqual(list(read.values()), contents)
            for stop_after in range(4):
                async with aclosing(store.read(pieces)) as parts:
                    for _ in range(stop_after):
                        await anext(parts)
                self.assertIsNone(await store.current())

    async def test_a_later_lead_fences_an_earlier_one(self) -> None:
        """Once another process has the lead, the one before it cannot publish, whatever it has prepared."""
        with running_valkey() as server:
            first, second = self.store(server), self.store(server)
            early = await first.take_lead("first", 5)
            manifest = await self.publish(first, early, 1, b"one")
            piece = await first.write(2, 0, [b"late"])
            late = await second.take_lead("second", 1)
            self.assertEqual((late.epoch, late.manifest), (6, manifest))
            with self.assertRaises(Fenced) as caught:
                await first.publish(Manifest(early.epoch, 2, {"products": Member(piece)}), 1, "first")
            self.assertEqual(caught.exception.epoch, 6)
            self.assertEqual(await second.current(), manifest)
            await self.publish(second, late, 2, b"two")
            with self.assertRaises(Fenced):
                await first.publish(Manifest(early.epoch, 3, {"products": Member(piece)}), 2, "first")

    async def test_commands_of_a_server_that_was_suspended(self) -> None:
        """A publish that waits in the socket of a suspended server is refused if a later lead arrives before it."""
        with running_valkey() as server:
            first, second = self.store(server), self.store(server)
            early = await first.take_lead("first", 5)
            piece = await first.write(1, 0, [b"one"])
            await second.take_lead("second", 5)
            server.process.send_signal(signal.SIGSTOP)
            late = Deferred.fromCoroutine(
                first.publish(Manifest(early.epoch, 1, {"products": Member(piece)}), 0, "first")
            )
            server.process.send_signal(signal.SIGCONT)
            with self.assertRaises(Fenced):
                await late

    async def test_a_manifest_that_is_overtaken(self) -> None:
        """A manifest that does not follow the current one, or names pieces that are not there, changes nothing."""
        with running_valkey() as server:
            store = self.store(server)
            lead = await store.take_lead("me", 5)
            current = await self.publish(store, lead, 1, b"one")
            piece = await store.write(2, 0, [b"two"])
            for after in (0, 2):
                with self.assertRaisesRegex(Overtaken, "overtaken: 1"):
                    await store.publish(Manifest(lead.epoch, 9, {"products": Member(piece)}), after, "me")
            await store.expire([piece], 0)
            with self.assertRaisesRegex(Overtaken, "missing: "):
                await store.publish(Manifest(lead.epoch, 2, {"products": Member(piece)}), 1, "me")
            self.assertEqual(await store.current(), current)
            with self.assertRaisesRegex(SnapshotRejected, "not there any more"):
                await self.data(store, piece)

    async def test_an_epoch_that_was_lost(self) -> None:
        """After a flush the next lead still has a greater epoch, and old leads are refused again."""
        with running_valkey() as server:
            store = self.store(server)
            before = await store.take_lead("me", 1000)
            await self.publish(store, before, 1, b"one")
            server.cli("FLUSHALL")
            self.assertIsNone(await store.current())
            after = await store.take_lead("me", before.epoch + 1)
            self.assertGreater(after.epoch, before.epoch)
            with self.assertRaises(Fenced):
                await self.publish(store, before, 2, b"two")

    async def test_a_cluster(self) -> None:
        """All keys of a unit are on one node, so that the script sees them all; other units are on others."""
        with running_cluster() as servers:
            for number in range(9):
                store = self.store(*servers, unit=f"dataset/d{number}")
                lead = await store.take_lead("me", 5)
                manifest = await self.publish(store, lead, 1, os.urandom(CHUNK_BYTES + 1))
                self.assertEqual(await store.current(), manifest)
            sizes = [int(server.cli("DBSIZE")) for server in servers]
            self.assertEqual((sum(sizes), 0 in sizes), (27, False))

    async def test_the_clock_of_the_server(self) -> None:
        """Its clock goes on, and names the run of the server, which changes with a restart."""
        with running_valkey() as server:
            store = self.store(server)
            first, second = await store.clock(), await store.clock()
            self.assertEqual(first.run, second.run)
            self.assertGreaterEqual(second.now_us, first.now_us)
            self.assertEqual(len(first.run), 40)

    async def test_something_else(self) -> None:
        """A key of something else is named, not taken for a manifest."""
        with running_valkey() as server:
            store = self.store(server)
            server.cli("HSET", NAMES.head.decode(), "manifest", "hello")
            with self.assertRaisesRegex(SnapshotRejected, r"cs:\{dataset/products\}:head: it is not a manifest"):
                await store.current()


PIECES = st.lists(st.tuples(st.integers(1, 5), st.text(max_size=8), st.integers(0, 9), st.integers(0, 99)), min_size=1)


class Manifests(SynchronousTestCase):
    @given(st.dictionaries(st.text(max_size=5), PIECES), st.integers(0, 2**53), st.integers(0, 2**53), st.binary())
    def test_bytes(
        self, members: dict[str, list[tuple[int, str, int, int]]], epoch: int, moment: int, renewal: bytes
    ) -> None:
        """A manifest comes back from its bytes, and damaged bytes are refused or another manifest, never an error."""

        def member(steps: list[tuple[int, str, int, int]]) -> Member:
            generation, pieces = 0, []
            for step, token, chunks, size_bytes in steps:
                pieces.append(Piece(generation + step, generation, token, chunks, size_bytes))
                generation += step
            first, *deltas = pieces
            return Member(first, tuple(deltas), renewal, moment)

        manifest = Manifest(epoch, moment, {name: member(steps) for name, steps in members.items()}, "run")
        data = manifest.to_bytes()
        self.assertEqual(from_bytes(data, "k"), manifest)
        for place in range(0, len(data), 7):
            changed = bytearray(data)
            changed[place] ^= 255
            try:
                from_bytes(bytes(changed), "k")
            except SnapshotRejected as error:
                self.assertTrue(str(error).startswith("k: "))

    def test_deltas_since(self) -> None:
        """The deltas that a replica lacks, or None if it needs the snapshot."""
        pieces = (Piece(4, 0, "a", 1, 1), Piece(5, 4, "b", 1, 1), Piece(8, 5, "c", 1, 1))
        member = Member(pieces[0], pieces[1:])
        self.assertEqual(member.generation, 8)
        for generation, since in ((8, ()), (5, pieces[2:]), (4, pieces[1:]), (3, None), (6, None), (9, None)):
            self.assertEqual(member.since(generation), since)
