"""Laws of the packets of pushed metrics."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ops.dataset_metrics import Sample
from cacheservice.ops.statsd import MOST_PACKET_BYTES, Lines, packets


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


class LinesTests(SynchronousTestCase):
    def test_gauges_and_counters(self) -> None:
        """A gauge is sent each time, a counter by its increase and only if it grew; names are as StatsD takes them."""
        lines = Lines("shop")
        rows = ("gauge", Sample("cacheservice_dataset_rows", {"dataset": "products"}, 5.0))
        for total, sent in ((2.0, ["2|c"]), (2.0, []), (5.5, ["3.5|c"])):
            reads = ("counter", Sample("cacheservice_reads_total", {"dataset": "products", "by": "a.b:c"}, total))
            expected = ["shop.dataset_rows.products:5|g", *(f"shop.reads_total.products.a_b_c:{each}" for each in sent)]
            self.assertEqual(list(lines.of([rows, reads])), expected)

    def test_series_without_a_use(self) -> None:
        """Buckets and labels without a value are not sent; without a prefix a name begins with its own."""
        samples = [
            ("counter", Sample("cacheservice_refresh_duration_seconds_bucket", {"le": "1"}, 1.0)),
            ("gauge", Sample("cacheservice_build_info", {}, 1.0)),
            ("gauge", Sample("cacheservice_ready", {}, 1.0)),
        ]
        self.assertEqual(list(Lines("").of(samples)), ["ready:1|g"])
