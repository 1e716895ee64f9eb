"""Laws of the throttle of wrong passwords and tokens."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ports.throttle import LONG_WAIT_S, PROVEN_S, SHORT_WAIT_S, Guess, Throttle
from tests.kit.clocks import started_clock

HOST = "192.0.2.1"


class Waits(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = started_clock()
        self.throttle = Throttle(self.clock.seconds)

    def waits(self, count: int, host: str = HOST) -> list[float]:
        """Of so many failures, each after the wait of the one before."""
        waits = []
        for _ in range(count):
            waits.append(self.throttle.failed(host))
            self.clock.advance(waits[-1])
        return waits

    def test_a_client_with_retries(self) -> None:
        """A client that tries eleven times gets all answers in about a second; none ever takes more than two."""
        self.assertLessEqual(sum(self.waits(11)), 1.2)
        waits = self.waits(100)
        self.assertEqual((waits[-1], max(waits)), (LONG_WAIT_S, 2.0))

    def test_forgiven_with_time(self) -> None:
        """Failures of long ago do not count, and another address has its own."""
        self.waits(40)
        self.assertEqual(self.throttle.failed("192.0.2.2"), SHORT_WAIT_S)
        self.clock.advance(60)
        self.assertEqual(self.throttle.failed(HOST), SHORT_WAIT_S)

    def test_guesses_in_a_second(self) -> None:
        """Whatever an address opens or closes, it has some 16 passwords looked at in a second."""
        looked_at = 0
        for _ in range(1000):
            while not self.throttle.is_full(HOST):
                self.throttle.failed(HOST)
                looked_at += 1
            self.clock.advance(0.1)
        self.assertLessEqual(looked_at, 100 * 16 + 64)

    def test_another_address_is_let_in(self) -> None:
        """The places are those of an address."""
        for _ in range(32):
            self.throttle.failed(HOST)
        self.assertEqual((self.throttle.is_full(HOST), self.throttle.is_full("192.0.2.2")), (True, False))
        self.clock.advance(LONG_WAIT_S)
        self.assertFalse(self.throttle.is_full(HOST))

    def test_addresses_of_one_network_are_one(self) -> None:
        """A client with 2**64 addresses is one guesser; IPv4 within IPv6 is IPv4."""
        for network, same, other in (
            ("2001:db8::1", "2001:db8::2:3", "2001:db8:0:1::1"),
            ("::ffff:192.0.2.9", "192.0.2.9", "::ffff:192.0.2.8"),
        ):
            for _ in range(32):
                self.throttle.failed(network)
            self.assertEqual((self.throttle.is_full(same), self.throttle.is_full(other)), (True, False))

    def test_memory_is_bounded(self) -> None:
        """A guesser with many networks does not fill the memory."""
        for number in range(3000):
            self.throttle.failed(f"10.{number // 250}.{number % 250}.1")
        self.assertLessEqual(len(self.throttle._networks), 1024)

    def test_proven_addresses(self) -> None:
        """A right secret proves its address for itself, for an hour."""
        self.throttle.succeeded(HOST, "a")
        self.clock.advance(PROVEN_S)
        self.assertTrue(self.throttle.is_proven(HOST, "a"))
        self.assertFalse(self.throttle.is_proven(HOST, "b"))
        self.assertFalse(self.throttle.is_proven("192.0.2.2", "a"))
        self.clock.advance(1)
        self.assertFalse(self.throttle.is_proven(HOST, "a"))

    def test_few_proven_addresses_are_kept(self) -> None:
        """The least recent ones are forgotten."""
        for number in range(5000):
            self.throttle.succeeded(f"10.{number // 250}.{number % 250}.1", "a")
            self.throttle.succeeded(HOST, "a")
        self.assertLessEqual(len(self.throttle._proven_at), 1024)
        self.assertTrue(self.throttle.is_proven(HOST, "a"))
        self.assertTrue(self.throttle.is_proven("10.19.249.1", "a"))
        self.assertFalse(self.throttle.is_proven("10.0.0.1", "a"))


class SeveralProcesses(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = started_clock()
        self.throttles = [Throttle(self.clock.seconds) for _ in range(3)]
        self.shared: list[Guess] = []
        for each in self.throttles:
            each.share(lambda guess, by=each: self.pass_on(guess, by))

    def pass_on(self, guess: Guess, by: Throttle) -> None:
        self.shared.append(guess)
        for each in self.throttles:
            if each is not by:
                each.take(guess)

    def test_a_guess_counts_everywhere(self) -> None:
        """The places and the delays are those of an address, whichever process it guesses at."""
        waits = [self.throttles[number % 3].failed(HOST) for number in range(32)]
        self.assertEqual((waits[23], waits[24]), (SHORT_WAIT_S, LONG_WAIT_S))
        self.assertEqual([each.is_full(HOST) for each in self.throttles], [True] * 3)
        self.throttles[1].withdraw(HOST)
        self.assertEqual([each.is_full(HOST) for each in self.throttles], [False] * 3)
        self.assertEqual(len(self.shared), 33)

    def test_a_proven_address(self) -> None:
        """It is proven everywhere, and shared once a minute however often it sends its secret."""
        for _ in range(10):
            self.throttles[0].succeeded(HOST, "resp.password")
        self.assertEqual([each.is_proven(HOST, "resp.password") for each in self.throttles], [True] * 3)
        self.clock.advance(61)
        self.throttles[0].succeeded(HOST, "resp.password")
        self.assertEqual(len(self.shared), 2)

    def test_a_new_process(self) -> None:
        """It knows what the others know, to the end of each delay."""
        for host in (HOST, "2001:db8::1", "::ffff:192.0.2.7", "not an address"):
            for _ in range(32):
                self.throttles[0].failed(host)
            self.throttles[0].succeeded(host, "http.token")
        new = Throttle(self.clock.seconds)
        new.restore(self.throttles[0].state())
        self.assertEqual(new.state(), self.throttles[0].state())
        self.assertTrue(new.is_full("2001:db8::2") and new.is_full("192.0.2.7") and new.is_proven(HOST, "http.token"))
        self.clock.advance(LONG_WAIT_S)
        self.assertFalse(new.is_full(HOST))
