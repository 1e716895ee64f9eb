"""Laws of the checks of passwords: what is compared, how long a wrong one waits, and what a file may still change."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ports import rejected
from cacheservice.ports.passwords import Passwords
from cacheservice.ports.throttle import LONG_WAIT_S, SHORT_WAIT_S

HOST, SECRET = "192.0.2.1", "resp.password"


class Checks(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.rejected = rejected.none_yet()
        self.reading: Deferred[None] | None = None
        self.passwords = Passwords(self.clock, self.rejected, lambda: self.reading)
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))

    def fill(self) -> None:
        while not self.passwords.is_full(HOST):
            self.passwords.throttle.failed(HOST)

    def refused_after(self, coming: Coroutine[Any, Any, bool | None]) -> float:
        """How long a refusal waits; it is counted at once."""
        count = self.rejected["auth_failed"]
        answer = Deferred.fromCoroutine(coming)
        self.assertEqual(self.rejected["auth_failed"], count + 1)
        began_at = self.clock.seconds()
        self.clock.advance(SHORT_WAIT_S)
        if self.clock.getDelayedCalls():
            self.clock.advance(LONG_WAIT_S - SHORT_WAIT_S)
        self.assertFalse(self.successResultOf(answer))
        return self.clock.seconds() - began_at

    def test_wrong(self) -> None:
        """The first wrong password waits a moment."""
        self.assertTrue(self.passwords.is_checked(HOST, SECRET))
        self.assertAlmostEqual(self.refused_after(self.passwords.refuse(HOST, lambda: True)), SHORT_WAIT_S)

    def test_too_many(self) -> None:
        """While the places of an address are taken, only proven passwords are compared, and wait longest."""
        self.passwords.accept(HOST, SECRET)
        self.fill()
        self.assertTrue(self.passwords.is_checked(HOST, SECRET))
        self.assertFalse(self.passwords.is_checked(HOST, "http.token"))
        self.assertAlmostEqual(self.refused_after(self.passwords.refuse(HOST, lambda: True)), LONG_WAIT_S)
        self.fill()
        self.assertAlmostEqual(self.refused_after(self.passwords.refuse_unchecked()), LONG_WAIT_S)

    def test_a_new_file(self) -> None:
        """A wrong password whose file has it by now is right, and no failure; another one is refused after that."""
        for right in (True, False):
            self.reading = Deferred()
            answer = Deferred.fromCoroutine(self.passwords.refuse(HOST, lambda right=right: right))
            self.assertNoResult(answer)
            self.reading.callback(None)
            if not right:
                self.assertNoResult(answer)
                self.clock.advance(SHORT_WAIT_S)
            self.assertIs(self.successResultOf(answer), right)
        self.assertEqual(self.rejected["auth_failed"], 1)

    def test_the_client_leaves(self) -> None:
        """A refusal that is cancelled leaves no timer."""
        answer = Deferred.fromCoroutine(self.passwords.refuse(HOST, lambda: False))
        answer.cancel()
        self.failureResultOf(answer, CancelledError)
