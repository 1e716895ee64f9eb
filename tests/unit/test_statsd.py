"""Laws of the packets of pushed metrics."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ops.statsd import MOST_PACKET_BYTES, packets


class Packets(SynchronousTestCase):
    @given(st.lists(st.integers(1, 700), min_size=3))
    def test_as_many_lines_as_fit(self, sizes: list[int]) -> None:
        """All lines arrive, in their order; no packet is too large; none could have held the next one's first line."""
        lines = [f"é{'x' * size}" for size in sizes]
        sent = list(packets(lines))
        self.assertEqual([line for packet in sent for line in packet.decode().split("\n")], lines)
        self.assertTrue(all(len(packet) <= MOST_PACKET_BYTES for packet in sent))
        for packet, following in pairwise(sent):
            first = following.split(b"\n")[0]
            self.assertGreater(len(packet) + 1 + len(first), MOST_PACKET_BYTES)
