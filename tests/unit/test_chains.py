"""Chains of pieces: which runs are replaced, and by what."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.replication.valkey.chains import (
    KEPT_DELTAS,
    MERGED_DELTAS,
    MOST_DELTAS,
    SMALL_BYTES,
    is_long,
    mergeable,
    must_begin_again,
    substituted,
)
from cacheservice.replication.valkey.manifest import Member, Piece


def chain(deltas: int, snapshot_bytes: int = 10_000_000, delta_bytes: int = 100) -> Member:
    """A member whose deltas have the generations from 2."""
    pieces = (Piece(number + 1, number, f"{number}", 1, delta_bytes) for number in range(1, deltas + 1))
    return Member(Piece(1, 0, "base", 1, snapshot_bytes), tuple(pieces), b"renewal", 7)


class Chains(SynchronousTestCase):
    @given(st.lists(st.booleans(), max_size=2 * (KEPT_DELTAS + MERGED_DELTAS)))
    def test_mergeable(self, known: list[bool]) -> None:
        """The longest run of older deltas that are known; the newest stay, and short runs do."""
        deltas = chain(len(known)).deltas
        tokens = {delta.token for delta, is_known in zip(deltas, known, strict=True) if is_known}
        older = "".join("x" if each else " " for each in known[: max(0, len(known) - KEPT_DELTAS)])
        longest = max(map(len, older.split()), default=0)
        run = mergeable(deltas, tokens)
        self.assertEqual(len(run), longest if longest >= MERGED_DELTAS else 0)
        self.assertLessEqual({delta.token for delta in run}, tokens)
        self.assertEqual(set(run) & set(deltas[-KEPT_DELTAS:]), set())
        self.assertTrue(all(later.base == earlier.generation for earlier, later in pairwise(run)))

    def test_a_chain_of_small_deltas_stays_short(self) -> None:
        """Each publish adds a delta, and each run is replaced at once; the generation stays the same."""
        member = chain(0)
        for number in range(1, 2000):
            delta = Piece(number + 1, number, f"{number}", 1, 100)
            member = Member(member.snapshot, (*member.deltas, delta))
            run = mergeable(member.deltas, {piece.token for piece in member.deltas})
            if run:
                merged = Piece(run[-1].generation, run[0].base, f"m{number}", 1, 100)
                shorter = substituted(member, run, merged)
                assert shorter is not None
                self.assertEqual(shorter.generation, member.generation)
                member = shorter
            self.assertLessEqual(len(member.deltas), KEPT_DELTAS + MERGED_DELTAS)
            chained = [member.snapshot.generation, *(piece.generation for piece in member.deltas)]
            self.assertEqual([piece.base for piece in member.deltas], chained[:-1])

    def test_substituted(self) -> None:
        """A snapshot replaces the pieces to its generation, what is no longer a run of the chain nothing."""
        member = chain(5)
        snapshot = Piece(4, 0, "new", 3, 99)
        self.assertEqual(
            substituted(member, member.pieces[:4], snapshot), Member(snapshot, member.deltas[3:], b"renewal", 7)
        )
        for run in ((), (member.snapshot, member.deltas[1]), (Piece(1, 0, "other", 1, 1),), chain(6).pieces):
            self.assertIsNone(substituted(member, run, snapshot))

    def test_sizes(self) -> None:
        """Small snapshots are written at once, large ones in the background, and at last at once."""
        for deltas, snapshot_bytes, long, again in (
            (10, SMALL_BYTES, False, False),
            (KEPT_DELTAS + 1, SMALL_BYTES, False, True),
            (MOST_DELTAS, 10_000_000, False, False),
            (MOST_DELTAS + 1, 10_000_000, True, False),
            (2 * MOST_DELTAS + 1, 10_000_000, True, True),
        ):
            member = chain(deltas, snapshot_bytes)
            self.assertEqual(
                (is_long(member), must_begin_again(member.deltas, member.snapshot)), (long, again), (deltas, member)
            )
        for delta_bytes, long, again in ((500_000, False, False), (500_001, True, False), (2_000_001, True, True)):
            member = chain(1, 1_000_000, delta_bytes)
            self.assertEqual((is_long(member), must_begin_again(member.deltas, member.snapshot)), (long, again))
        self.assertTrue(must_begin_again(chain(1, 1000, 501).deltas, chain(1, 1000).snapshot))
