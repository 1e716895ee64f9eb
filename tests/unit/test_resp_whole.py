"""Laws of a RESP port that is a part of a service: what it asks the main process, and what it answers itself."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import MainUnavailable, UnknownDataset
from cacheservice.ports.resp import client_list
from cacheservice.ports.resp.whole import ServiceInfo, Totals
from tests.kit.clocks import started_clock
from tests.kit.resp import encode
from tests.kit.resp_peer import filled_cache
from tests.kit.resp_session import FakeLink, make_server, parsed
from tests.kit.whole import FakeWhole

TOTALS = Totals(clients=70, blocked=3, connections_received=900, commands_processed=8000, rejected=5)
SILENT = MainUnavailable("the main process did not answer within 5 s; repeat the command")


class AskingTheMainProcess(SynchronousTestCase):
    def setUp(self) -> None:
        clock = started_clock()
        self.server = make_server(filled_cache(clock.seconds, 20), clock)
        self.whole = FakeWhole()
        self.server.join(self.whole)
        self.client, self.other = FakeLink(self.server, 7), FakeLink(self.server, 8)

    def ask(self, answer: object, *words: bytes | str | int) -> Any:
        """The reply to a command that the main process answers."""
        self.client.send(encode(*words))
        self.assertEqual(self.client.take(), b"")
        self.asked = self.whole.answer(answer)
        (reply,) = parsed(self.client.take())
        return reply

    def fields(self, text: bytes) -> dict[bytes, bytes]:
        return dict(line.split(b":", 1) for line in text.split(b"\r\n") if b":" in line)

    def test_info(self) -> None:
        """Its counts are of all processes, and its keys those of this process's snapshots."""
        fields = self.fields(self.ask(ServiceInfo(1234, 93.7, TOTALS), "INFO"))
        self.assertEqual(self.asked, "info")
        expected = {
            b"process_id": b"1234",
            b"uptime_in_seconds": b"93",
            b"connected_clients": b"70",
            b"blocked_clients": b"3",
            b"total_connections_received": b"900",
            b"total_commands_processed": b"8000",
            b"rejected_connections": b"5",
        }
        self.assertEqual({name: fields[name] for name in expected}, expected)
        self.assertIn(b"keys=", fields[b"db0"])

    def test_client_list(self) -> None:
        """The lines are those of the main process; CLIENT INFO and CLIENT ID are answered here."""
        self.assertEqual(self.ask(b"id=1 \nid=2 \n", "CLIENT", "LIST"), b"id=1 \nid=2 \n")
        self.assertEqual(self.client.ask_all(("CLIENT", "ID")), [7])
        self.assertTrue(self.client.ask_all(("CLIENT", "INFO"))[0].startswith(b"id=7 "))
        self.assertEqual(self.whole.asked, [])

    def test_cache_info(self) -> None:
        """An unknown name needs no question; one that only this process still has is unknown, too."""
        self.assertEqual(self.ask({"rows": 3}, "CACHE.INFO", "products"), [b"rows", 3])
        self.assertEqual(self.asked, "dataset products")
        self.assertEqual(self.client.ask_all(("CACHE.INFO", "nope")), ["ERR unknown dataset 'nope'"])
        gone = self.ask(UnknownDataset("unknown dataset 'products'"), "CACHE.INFO", "products")
        self.assertEqual(gone, "ERR unknown dataset 'products'")

    def test_a_silent_main_process(self) -> None:
        """The client gets an error, and its connection goes on."""
        for words in (("INFO",), ("CLIENT", "LIST"), ("CACHE.INFO", "products")):
            self.assertEqual(self.ask(SILENT, *words), f"ERR {SILENT}")
        self.assertEqual(self.client.ask_all(("PING",)), [b"PONG"])

    def test_a_client_that_asks_is_not_blocked(self) -> None:
        """As without workers: only a command that waits for an event blocks its client."""
        self.client.send(encode("CLIENT", "LIST"))
        self.other.send(encode("CACHE.WAIT", "products", 10**9, 60_000))
        self.assertTrue(self.client.is_waiting and self.other.is_waiting)
        lines = [client_list.line(each) for each in self.server.sessions.values()]
        self.assertEqual([b"flags=b" in line for line in lines], [False, True])
        self.assertEqual(self.server.totals().blocked, 1)
        self.whole.answer(b"")
        self.assertEqual(self.client.take(), b"$0\r\n\r\n")

    def test_within_multi(self) -> None:
        """The replies are in their places; the other commands run together once the main process has answered."""
        commands = (("MULTI",), ("INFO",), ("GET", "products:nope"), ("CLIENT", "LIST"), ("CACHE.INFO", "products"))
        for words in (*commands, ("EXEC",)):
            self.client.send(encode(*words))
        self.assertEqual(self.client.take(), b"+OK\r\n" + 4 * b"+QUEUED\r\n")
        self.assertEqual(self.whole.answer(ServiceInfo(1, 2.0, TOTALS)), "info")
        self.assertEqual(self.client.take(), b"")
        self.assertEqual(self.whole.answer(SILENT), "client_list")
        self.assertEqual(self.whole.answer({"rows": 3}), "dataset products")
        ((info, missing, clients, fields),) = parsed(self.client.take())
        self.assertEqual(self.fields(info)[b"connected_clients"], b"70")
        self.assertEqual((missing, str(clients), fields), (None, f"ERR {SILENT}", [b"rows", 3]))

    def test_the_sum(self) -> None:
        """Channels that several processes have subscribers of are one channel."""
        one = Totals(1, 2, 3, 4, 5, frozenset({"a", "b"}), 6, 7, 8.0, 9.0)
        other = Totals(10, 20, 30, 40, 50, frozenset({"b", "c"}), 60, 70, 80.0, 90.0)
        self.assertEqual(one + other, Totals(11, 22, 33, 44, 55, frozenset("abc"), 66, 77, 88.0, 99.0))
