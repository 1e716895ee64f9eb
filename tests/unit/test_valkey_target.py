"""The URL of a Valkey, and the slots of a cluster."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.replication.valkey.slots import SlotMap, slot_of
from cacheservice.replication.valkey.target import BadUrl, Target, parse


class Urls(SynchronousTestCase):
    def test_forms(self) -> None:
        for url, target in (
            ("redis://valkey", Target((("valkey", 6379),))),
            ("valkey://10.0.0.1:7000/2", Target((("10.0.0.1", 7000),), database=2)),
            ("rediss://[::1]:6380", Target((("::1", 6380),), tls=True)),
            ("redis://:p%40ss@a:1,b:2,c:3", Target((("a", 1), ("b", 2), ("c", 3)), password="p@ss")),
            ("redis://reader:secret@a", Target((("a", 6379),), user="reader", password="secret")),
            ("redis+sentinel://a,b:5/shop/1", Target((("a", 26379), ("b", 5)), service="shop", database=1)),
        ):
            self.assertEqual(parse(url), target, url)

    def test_refused(self) -> None:
        """A refusal names the problem and never the password."""
        for url, problem in (
            ("localhost:6379", "it is not a URL of a Valkey"),
            ("http://a", "the scheme http is unknown"),
            ("redis://:topsecret@a:0", "'a:0' is not a host with a port from 1 to 65535"),
            ("redis://:topsecret@a:99999", "'a:99999' is not a host with a port"),
            ("redis://:topsecret@a/x", "the database is not a number"),
            ("redis://a,b/1", "a cluster has database 0 only"),
            ("redis+sentinel://:topsecret@a", "the name of the service that the sentinels watch is missing"),
            ("redis://", "'' is not a host"),
        ):
            with self.assertRaises(BadUrl) as caught:
                parse(url)
            self.assertIn(problem, str(caught.exception))
            self.assertNotIn("topsecret", str(caught.exception))

    def test_no_password_in_its_representation(self) -> None:
        self.assertNotIn("topsecret", repr(parse("redis://me:topsecret@a")))


class Slots(SynchronousTestCase):
    def test_examples_of_the_specification(self) -> None:
        """0x31C3 is the CRC-16 of 123456789; braces choose what counts."""
        self.assertEqual(slot_of(b"123456789"), 0x31C3)
        self.assertEqual(slot_of(b"{user1000}.following"), slot_of(b"{user1000}.followers"))
        self.assertEqual(slot_of(b"foo{}{bar}"), slot_of(b"foo{}{bar}"))
        self.assertNotEqual(slot_of(b"foo{}{bar}"), slot_of(b"bar"))
        self.assertEqual(slot_of(b"foo{{bar}}zap"), slot_of(b"{bar"))

    def test_a_map(self) -> None:
        slots = SlotMap()
        slots.learn([[0, 8191, [b"", 7000, b"id"]], [8192, 16383, [b"10.0.0.2", 7001, b"id"]]], ("10.0.0.1", 7000))
        self.assertEqual(slots.node_of(b"123456789"), ("10.0.0.2", 7001))
        self.assertEqual(slots.nodes, [("10.0.0.1", 7000), ("10.0.0.2", 7001)])
        slots.moved(slot_of(b"123456789"), ("10.0.0.3", 7002))
        self.assertEqual(slots.node_of(b"123456789"), ("10.0.0.3", 7002))
        self.assertEqual(SlotMap().node_of(b"x"), None)
