"""Laws of access to the HTTP port: its tokens, its levels, and its table of routes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.cache import Cache
from cacheservice.ports import rejected
from cacheservice.ports.clients import Limits
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.http import AccessSettings, HttpFactory, Served
from cacheservice.ports.http.access import Access, Level
from cacheservice.ports.http.guard import Guard
from cacheservice.ports.http.messages import Reply
from cacheservice.ports.http.problem import Problem
from cacheservice.ports.http.request_head import Head
from cacheservice.ports.throttle import LONG_WAIT_S, SHORT_WAIT_S
from tests.kit.clocks import started_clock
from tests.kit.datasets import declared
from tests.kit.fake_refreshes import FakeRefreshes

READ, OPERATE, WRONG = b"Bearer read", b"Bearer operate", b"Bearer wrong"


class Asked(Head):
    """A request from one address."""

    def __init__(self, method: bytes, target: bytes, headers: Mapping[bytes, bytes]) -> None:
        super().__init__(method, target)
        self.headers.update(headers)

    def host(self) -> str:
        return "192.0.2.1"


def asked(authorization: bytes | None, method: bytes = b"GET", target: bytes = b"/") -> Asked:
    return Asked(method, target, {} if authorization is None else {b"authorization": authorization})


class Guesses(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = started_clock()
        self.guard = Guard("secret", "", rejected.none_yet(), self.clock)

    def guess(self, host: str = "192.0.2.1") -> list[Problem]:
        problems: list[Problem] = []
        self.guard.admit(host, b"Bearer wrong")
        refused = Deferred.fromCoroutine(self.guard.refuse_wrong(host, lambda: False))
        refused.addErrback(lambda failure: problems.append(failure.value))
        return problems

    def waited_s(self, host: str = "192.0.2.1") -> float:
        """How long one more guess waits for its answer."""
        problems = self.guess(host)
        began_at = self.clock.seconds()
        while not problems:
            self.clock.advance(min(call.getTime() for call in self.clock.getDelayedCalls()) - self.clock.seconds())
        self.assertEqual(problems[0].status, 401)
        return float(self.clock.seconds() - began_at)

    def test_a_guess_waits(self) -> None:
        """As the throttle of each port has it: see test_throttle.py."""
        waits = [round(self.waited_s(), 3) for _ in range(30)]
        self.assertEqual((waits[0], waits[-1]), (SHORT_WAIT_S, LONG_WAIT_S))

    def test_many_at_once_are_refused_unread(self) -> None:
        """Guesses in parallel do not avoid the wait: with 32 waiting, not even the right token is looked at."""
        waiting = [self.guess() for _ in range(32)]
        with self.assertRaises(Problem) as caught:
            self.guard.admit("192.0.2.1", b"Bearer secret")
        self.assertEqual(caught.exception.status, 429)
        self.guard.admit("192.0.2.2", b"Bearer secret")
        self.clock.advance(LONG_WAIT_S)
        self.assertTrue(all(waiting))
        self.guard.admit("192.0.2.1", b"Bearer secret")

    def test_each_token_proves_itself_only(self) -> None:
        """An address that has sent the token for reading cannot guess at the other one while its places are taken."""
        self.guard = Guard("secret", "admin", rejected.none_yet(), self.clock)
        self.assertTrue(self.guard.accepts("192.0.2.1", b"Bearer secret"))
        self.assertFalse(self.guard.accepts_commands("192.0.2.1", b"Bearer secret"))
        self.assertFalse(self.guard.accepts("192.0.2.1", b"Basic admin"))
        waiting = [self.guess() for _ in range(32)]
        self.guard.admit("192.0.2.1", b"Bearer secret")
        for guess in (b"Bearer admin", b"Basic secret", b"Bearer wrong", b""):
            with self.assertRaises(Problem) as caught:
                self.guard.admit("192.0.2.1", guess)
            self.assertEqual(caught.exception.status, 429)
        self.clock.advance(LONG_WAIT_S)
        self.assertTrue(all(waiting))
        self.assertTrue(self.guard.accepts_commands("192.0.2.1", b"Bearer admin"))
        waiting = [self.guess() for _ in range(32)]
        self.guard.admit("192.0.2.1", b"Bearer admin")
        # A replaced token proves its address for the next one.
        self.guard.replace("new secret", "admin")
        self.guard.admit("192.0.2.1", b"Bearer new secret")
        with self.assertRaises(Problem):
            self.guard.admit("192.0.2.1", b"Bearer secret")
        self.clock.advance(LONG_WAIT_S)

    def test_a_guesser_that_goes(self) -> None:
        """A wait that is cancelled leaves no timer, and its place stays taken: leaving does not avoid the wait."""
        for _ in range(32):
            refused = Deferred.fromCoroutine(self.guard.refuse_wrong("192.0.2.1", lambda: False))
            refused.addErrback(lambda _: None)
            refused.cancel()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        with self.assertRaises(Problem):
            self.guard.admit("192.0.2.1", b"Bearer secret")


class Levels(SynchronousTestCase):
    def statuses(self, access: Access) -> dict[Level, list[int]]:
        """The status of a refusal, or 0, for each level: without a token, with a wrong one, and with each right one."""
        found: dict[Level, list[int]] = {}
        for level, authorization in product(Level, (None, WRONG, READ, OPERATE)):
            try:
                checking = access.check(level, asked(authorization))
                status = 0
                if checking is not None:
                    checking.close()
                    status = 401
            except Problem as problem:
                status = problem.status
            found.setdefault(level, []).append(status)
        return found

    def access(self, token: str, admin_token: str, allow_data: bool) -> Access:
        needs = token or admin_token
        guard = Guard(token, admin_token, rejected.none_yet(), started_clock()) if needs else None
        return Access(guard, allow_data)

    def test_levels(self) -> None:
        """What each request gets from a port with and without tokens, on the loopback address and beyond it."""
        free, nothing = [0, 0, 0, 0], [403, 403, 403, 403]
        reader = [401, 401, 0, 0]
        for token, admin_token, allow_data, read, listen, command in (
            ("", "", True, free, free, nothing),
            ("", "", False, nothing, nothing, nothing),
            ("read", "", True, [401, 401, 0, 401], [401, 401, 0, 401], [401, 401, 403, 401]),
            ("read", "operate", False, reader, reader, [401, 401, 403, 0]),
            ("", "operate", True, free, [0, 401, 401, 0], [401, 401, 401, 0]),
            ("", "operate", False, [401, 401, 401, 0], [401, 401, 401, 0], [401, 401, 401, 0]),
        ):
            found = self.statuses(self.access(token, admin_token, allow_data))
            settings = (token, admin_token, allow_data)
            self.assertEqual(found[Level.OPEN], free, settings)
            self.assertEqual(found[Level.PUBLIC], free if token or admin_token or allow_data else nothing, settings)
            self.assertEqual((found[Level.READ], found[Level.LISTEN]), (read, listen), settings)
            self.assertEqual(found[Level.COMMAND], command, settings)

    def test_rights(self) -> None:
        """A listener learns its rights: those of its token, or to read."""
        access = self.access("read", "operate", True)
        for authorization, rights in ((None, "read"), (READ, "read"), (OPERATE, "admin")):
            self.assertEqual(access.rights(asked(authorization)), rights)
        self.assertEqual(self.access("", "", True).rights(asked(OPERATE)), "read")

    def test_settings_show_no_token(self) -> None:
        """The tokens are not in the text of the settings, which may be logged."""
        self.assertNotIn("operate", repr(AccessSettings("read", "operate")))


class Routing(SynchronousTestCase):
    def factory(self, token: str = "", admin_token: str = "") -> HttpFactory:
        clock: Clock = started_clock()
        cache = Cache([declared("products")], clock.seconds)
        served = Served(cache, Freshness(FakeRefreshes(), cache.database, clock), FakeRefreshes())  # type: ignore[arg-type]
        return HttpFactory(served, AccessSettings(token, admin_token), Limits(10, 60.0), clock)  # type: ignore[arg-type]

    def test_each_path_fits_one_route(self) -> None:
        """No path is answered by two routes, so that the order of the table does not matter."""
        for factory in (self.factory(), self.factory("read", "operate")):
            routes = factory.routes._routes
            for _, route, _ in routes:
                path = route.template.replace("{name}", "products").replace("{rest}", "x/status")
                path = path.replace("{command}", "refresh")
                fits = [other for pattern, other, _ in routes if pattern.fullmatch(path.encode())]
                self.assertEqual(fits, [route])

    def test_what_a_client_learns_without_the_token(self) -> None:
        """Under /v1/ everything is 401, also what does not exist; elsewhere the form of a request is checked first."""
        routes = self.factory("read", "operate").routes
        for method, target, status in (
            (b"GET", b"/v1/datasets", 401),
            (b"GET", b"/v1/nothing", 401),
            (b"POST", b"/v1/datasets/products", 401),
            (b"POST", b"/v1/datasets/products/refresh", 401),
            (b"GET", b"/v1/datasets/products/refresh?x", 401),
            (b"POST", b"/events", 405),
            (b"GET", b"/events?x", 400),
            (b"GET", b"/events", 401),
            (b"GET", b"/nothing", 404),
            (b"GET", b"/livez#x", 400),
        ):
            with self.assertRaises(Problem) as caught:
                routes.answer(asked(None, method, target))
            self.assertEqual(caught.exception.status, status, target)
        self.assertIsInstance(routes.answer(asked(None, b"GET", b"/livez")), Reply)

    def test_methods(self) -> None:
        """405 names the methods of the path: GET and HEAD for reads, POST for commands of a port that has them."""
        reading, commanding = self.factory().routes, self.factory(admin_token="operate").routes
        for routes, method, target, status, allowed in (
            (reading, b"POST", b"/v1/datasets", 405, b"Allow: GET, HEAD\r\n"),
            (reading, b"POST", b"/v1/datasets/products/refresh", 405, b"Allow: GET, HEAD\r\n"),
            (reading, b"GET", b"/v1/datasets/products/refresh", 404, b""),
            (reading, b"POST", b"/v1/datasets/products/nothing", 404, b""),
            (reading, b"GET", b"/metrics", 404, b""),
            (commanding, b"GET", b"/v1/datasets/products/refresh", 405, b"Allow: POST\r\n"),
            (commanding, b"DELETE", b"/v1/datasets/products/pin", 405, b"Allow: POST\r\n"),
        ):
            with self.assertRaises(Problem) as caught:
                routes.answer(asked(OPERATE, method, target))
            self.assertEqual((caught.exception.status, caught.exception.headers), (status, allowed), target)
