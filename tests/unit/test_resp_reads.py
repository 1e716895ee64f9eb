"""Laws of the reads of Redis clients: rows, whole hashes, errors and what is not there, on a session alone."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ports.resp.command_docs import catalogue
from tests.kit.clocks import started_clock
from tests.kit.resp import Words
from tests.kit.resp_peer import ROWS, document, failed_attempt, filled_cache, publish
from tests.kit.resp_session import FakeLink, make_server


class Reads(SynchronousTestCase):
    def setUp(self) -> None:
        self.now = started_clock()
        self.cache = filled_cache(self.now.seconds)
        self.server = make_server(self.cache, self.now)

    def ask_all(self, *commands: Words, protocol: int = 2) -> list[Any]:
        """The replies to commands of a client of its own."""
        client = FakeLink(self.server)
        if protocol == 3:
            client.ask("HELLO", 3)
        return client.ask_all(*commands)

    def ask(self, *words: bytes | str | int, protocol: int = 2) -> Any:
        (answer,) = self.ask_all(words, protocol=protocol)
        return answer

    def assert_asks(self, words: str, expected: Any, protocol: int = 2) -> None:
        self.assertEqual(self.ask(*words.split(), protocol=protocol), expected, words)

    def test_rows(self) -> None:
        """Each row is a string key and a field of its dataset's hash, with one document."""
        row = document(7, 1)
        for words, expected in (
            ("GET products:7", row),
            ("GET products:nope", None),
            ("MGET products:7 products:nope strict:1", [row, None, document(1, 1)]),
            ("EXISTS products:7 products:7 products products:nope", 3),
            ("STRLEN products:7", len(row)),
            ("TYPE products:7", b"string"),
            ("TYPE products", b"hash"),
            ("TYPE products:nope", b"none"),
            ("HGET products 7", row),
            ("HGET products nope", None),
            ("HMGET products 7 nope", [row, None]),
            ("HEXISTS products 7", 1),
            ("HEXISTS products nope", 0),
            ("HLEN products", ROWS),
            ("HLEN empty", 0),
            ("HSTRLEN products 7", len(row)),
            ("HGETALL empty", []),
            ("DBSIZE", ROWS + 3 + 3),
            ("CACHE.LIST", [b"products", b"empty", b"strict", b"prices"]),
            ("ECHO hi", b"hi"),
            ("SELECT 0", b"OK"),
        ):
            self.assert_asks(words, expected)

    def test_whole_hashes(self) -> None:
        """HGETALL, HKEYS and HVALS give every row once, in one order; a map in protocol 3."""
        expected = {b"%d" % number: document(number, 1) for number in range(ROWS)}
        flat = self.ask("HGETALL", "products")
        self.assertEqual(dict(zip(flat[::2], flat[1::2], strict=True)), expected)
        self.assertEqual(self.ask("HGETALL", "products", protocol=3), expected)
        self.assertEqual(self.ask("HKEYS", "products"), flat[::2])
        self.assertEqual(self.ask("HVALS", "products"), flat[1::2])

    def test_any_key(self) -> None:
        """A key may hold any bytes, colons too."""
        keys = [b"a:b", b":", b"", b"\r\n", b"\x00\xff", b"*", b"x" * 60_000]
        publish(self.cache, "empty", iter(keys))
        for number, key in enumerate(keys):
            self.assertEqual(self.ask("GET", b"empty:" + key), document(number, 1 + 1))
            self.assertEqual(self.ask("HGET", "empty", key), document(number, 1 + 1))

    def test_time_to_expiry(self) -> None:
        """TTL and PTTL are the time to the expiry of the snapshot, 0 after it, -2 for what is not there."""
        self.now.advance(30.25)
        self.assert_asks("PTTL products:7", 149_750)
        self.assert_asks("TTL products", 150)
        self.now.advance(1000)
        self.assert_asks("PTTL products", 0)
        self.assert_asks("TTL products:nope", -2)

    def test_errors(self) -> None:
        """Errors have the documented codes."""
        reads = [
            "GET {}:1",
            "MGET products:1 {}:1",
            "EXISTS {}",
            "STRLEN {}:1",
            "TYPE {}",
            "TTL {}",
            "PTTL {}:1",
            "HGET {} 1",
        ]
        reads += [
            "HMGET {} 1",
            "HGETALL {}",
            "HEXISTS {} 1",
            "HLEN {}",
            "HKEYS {}",
            "HVALS {}",
            "HSTRLEN {} 1",
            "HSCAN {} 0",
        ]
        reads += ["CACHE.AGE {}"]
        self.now.advance(200)
        for name, expected in (
            ("prices", "LOADING prices has not been loaded yet"),
            ("strict", "STALE strict is 200 s old, limit 180 s"),
            ("nope", "ERR unknown dataset 'nope'"),
        ):
            for read in reads:
                self.assert_asks(read.format(name), expected)
        # Its first attempt has ended: the start is over.
        self.cache.dataset("prices").attempted(failed_attempt())
        for read in reads:
            expected = "NOTLOADED prices has not been loaded yet; CACHE.INFO prices has its last attempt"
            self.assert_asks(read.format("prices"), expected)
        self.assert_asks("CACHE.INFO nope", "ERR unknown dataset 'nope'")
        self.assert_asks("CACHE.WAIT nope 1 1", "ERR unknown dataset 'nope'")
        self.assert_asks("FOO a", "ERR unknown command 'FOO'")
        self.assert_asks("products:1", "ERR unknown command 'products:1'")
        # One that is served however old it is.
        self.assert_asks("GET products:1", document(1, 1))

    def test_writes(self) -> None:
        """Every command of Redis that writes gets READONLY, in a transaction too."""
        writes = sorted(catalogue().writes)
        self.assertGreater(len(writes), 90)

        answers = self.ask_all(*[(name, "products:1", "x") for name in writes])
        self.assertEqual(set(answers), {"READONLY this cache is read-only"})
        _, refused, aborted = self.ask_all(("MULTI",), ("SET", "a", "b"), ("EXEC",))
        self.assertEqual(refused, "READONLY this cache is read-only")
        self.assertTrue(aborted.startswith("EXECABORT"))

    def test_cache_commands(self) -> None:
        """CACHE.INFO is the fields of `json`, CACHE.AGE the age in seconds."""
        self.now.advance(12.3456)
        self.assert_asks("CACHE.AGE products", b"12.346")
        info = self.ask("CACHE.INFO", "products")
        fields = dict(zip(info[::2], info[1::2], strict=True))
        expected = {
            b"state": b"fresh",
            b"rows": ROWS,
            b"generation": 1,
            b"held": None,
            b"pinned": 0,
            b"age_s": b"12.346",
        }
        self.assertEqual({name: fields.get(name) for name in expected}, expected)
        info = self.ask("CACHE.INFO", "products", protocol=3)
        self.assertEqual((info[b"age_s"], info[b"pinned"], info[b"as_of"]), (12.346, False, b"2026-01-02T03:04:05Z"))
        self.assertEqual((self.ask("CACHE.INFO", "prices", protocol=3))[b"generation"], 0)
