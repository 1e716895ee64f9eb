"""Laws of rotated secrets: the clients that are let in, and the files that are read."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from cacheservice import config
from cacheservice.ports import rejected
from cacheservice.ports.http.guard import Guard
from cacheservice.ports.http.problem import Problem
from cacheservice.ports.rotation import ClientSecrets, Rotation
from cacheservice.ports.throttle import LONG_WAIT_S, SHORT_WAIT_S, Throttle
from tests.kit.logs import Log
from tests.kit.threads import ReactorWithThreads

STARTED = ClientSecrets("old password", "old token", "old admin")


class Rotating(SynchronousTestCase):
    def setUp(self) -> None:
        self.reactor = ReactorWithThreads()
        self.files: dict[str, str] = {}
        self.reads = 0
        self.log = Log()
        self.replaced: list[ClientSecrets] = []
        self.rotation = self.make()

    def make(self, started: ClientSecrets = STARTED, *, has_files: bool = True) -> Rotation:
        rotation = Rotation(started, self.read, has_files=has_files, reactor=self.reactor, log=self.log)
        rotation.watch(self.replaced.append)
        return rotation

    def read(self) -> Mapping[str, str]:
        self.reads += 1
        return self.files

    def test_once_a_second(self) -> None:
        """All checks during a read wait for it; the next read is a second later."""
        looking = [self.rotation.look() for _ in range(3)]
        self.reactor.pool.run()
        for each in looking:
            assert each is not None
            self.assertIsNone(self.successResultOf(each))
        self.reactor.advance(0.99)
        self.assertIsNone(self.rotation.look())
        self.reactor.advance(0.01)
        self.assertIsNotNone(self.rotation.look())
        self.reactor.pool.run()
        self.assertEqual(self.reads, 2)

    def test_without_files(self) -> None:
        """Nothing is read."""
        self.assertIsNone(self.make(has_files=False).look())
        self.assertEqual(self.reactor.pool.calls, [])

    def test_what_is_replaced(self) -> None:
        """Each secret by its file, once; one that is empty, or was not asked for at the start, changes nothing."""
        self.files = {"resp.password": "new", "http.token": "", "http.admin_token": "old admin"}
        self.rotation.look()
        self.reactor.pool.run()
        self.assertEqual(self.replaced, [ClientSecrets("new", "old token", "old admin")])
        self.assertEqual(
            [(event, fields["keys"]) for event, fields in self.log.events], [("secrets_read_again", ["resp.password"])]
        )
        self.assertNotIn("new", repr(self.replaced))
        self.reactor.advance(1)
        self.rotation.look()
        self.reactor.pool.run()
        self.assertEqual(len(self.replaced), 1)
        self.assertEqual(
            self.make(ClientSecrets("", "t", "")).take({"resp.password": "p", "http.admin_token": "a"}), []
        )

    def test_one_token_for_both(self) -> None:
        """A token that would be both is not used, and the log names the keys."""
        for files in ({"http.token": "old admin"}, {"http.token": "same", "http.admin_token": "same"}):
            self.assertEqual(self.rotation.take(files | {"resp.password": "old password"}), [])
        self.assertEqual([event for event, _ in self.log.events], ["secret_not_used"] * 2)
        # They may change places.
        self.assertEqual(
            self.rotation.take({"http.token": "old admin", "http.admin_token": "old token"}),
            ["http.token", "http.admin_token"],
        )

    def test_a_reload_meanwhile(self) -> None:
        """What was read before it ended is not used."""
        self.files = {"http.token": "older"}
        looking = self.rotation.look()
        self.assertEqual(self.rotation.take({"http.token": "newer"}), ["http.token"])
        self.reactor.pool.run()
        assert looking is not None
        self.successResultOf(looking)
        self.assertEqual([each.token for each in self.replaced], ["newer"])

    def test_a_bug(self) -> None:
        """It is logged, and waiting clients go on."""
        self.patch(self, "files", None)
        self.rotation = Rotation(STARTED, lambda: 1 / 0, has_files=True, reactor=self.reactor, log=self.log)  # type: ignore[arg-type,return-value]
        looking = self.rotation.look()
        self.reactor.pool.run()
        assert looking is not None
        self.assertIsNone(self.successResultOf(looking))
        self.assertEqual([event for event, _ in self.log.events], ["internal_error"])
        self.reactor.advance(1)
        self.assertIsNotNone(self.rotation.look())

    def test_guesses(self) -> None:
        """While the files are read a guess has its place among those that wait, so that no more are looked at."""
        guard = Guard("old token", "", rejected.none_yet(), self.reactor, look=self.rotation.look)
        self.rotation.watch(lambda secrets: guard.replace(secrets.token, secrets.admin_token))
        waiting = [Deferred.fromCoroutine(guard.refuse_wrong("192.0.2.1", lambda: False)) for _ in range(32)]
        with self.assertRaises(Problem) as refused:
            guard.admit("192.0.2.1", b"Bearer old token")
        self.assertEqual(refused.exception.status, 429)
        self.reactor.pool.run()
        self.reactor.advance(LONG_WAIT_S)
        for each in waiting:
            self.assertEqual(self.failureResultOf(each, Problem).value.status, 401)

    def test_many_right_ones_at_once(self) -> None:
        """Behind a proxy all clients have one address: those that turn out to be right leave no failure behind."""
        throttle = Throttle(self.reactor.seconds)
        for _ in range(100):
            self.assertEqual(throttle.failed("192.0.2.1"), SHORT_WAIT_S)
            throttle.withdraw("192.0.2.1")
        self.assertFalse(throttle.is_full("192.0.2.1"))
        throttle.withdraw("192.0.2.2")


class Files(SynchronousTestCase):
    def test_which_are_read(self) -> None:
        """Those that variables name, without the last line end; one that cannot be read is left out."""
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        (folder / "password").write_text("hidden word\n\n")
        (folder / "binary").write_bytes(b"\xff")
        environ = {
            "CACHESERVICE_RESP__PASSWORD_FILE": str(folder / "password"),
            "CACHESERVICE_HTTP__TOKEN_FILE": str(folder / "nothing"),
            "CACHESERVICE_HTTP__ADMIN_TOKEN_FILE": str(folder / "binary"),
            "CACHESERVICE_POSTGRES__DSN_FILE": str(folder / "password"),
        }
        self.assertEqual(config.client_secrets_in_files(environ), {"resp.password": "hidden word\n"})
        self.assertEqual(config.client_secret_files({"CACHESERVICE_RESP__PASSWORD": "x"}), {})
