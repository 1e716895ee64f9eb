"""Laws of rotated secrets: a client that sends the new one is served, with no restart and no reload."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.kit.daemon import QUICK, Daemon, DaemonTestCase
from tests.kit.waiting import GIVE_UP_S, wait_until


class Clients(DaemonTestCase):
    """Real clients of a service whose secrets lie in files, as Kubernetes mounts them."""

    def begun(self) -> Daemon:
        self.mounted = self.directory / "secrets"
        self.mounted.mkdir()
        self.rotate(1)
        variables = {"RESP__PASSWORD": "resp", "HTTP__TOKEN": "http", "HTTP__ADMIN_TOKEN": "admin"}
        environ = {f"CACHESERVICE_{name}_FILE": str(self.mounted / file) for name, file in variables.items()}
        admin = f'[admin]\nsocket = "{self.directory}/admin"\n'
        daemon = self.started(self.configuration(QUICK, admin), environ=environ)
        daemon.wait_until_ready()
        return daemon

    def rotate(self, number: int) -> None:
        """As the kubelet does it: a new folder, to which a link is moved in one step."""
        folder = self.mounted / f"..{number}"
        folder.mkdir()
        for name in ("resp", "http", "admin"):
            (folder / name).write_text(f"{name}-secret-{number}\n")
            if not (self.mounted / name).is_symlink():
                (self.mounted / name).symlink_to(f"..data/{name}")
        (self.mounted / "..new").symlink_to(folder.name)
        (self.mounted / "..new").replace(self.mounted / "..data")

    def port(self, daemon: Daemon, name: str) -> int:
        return int(daemon.event("service_started")[name].rpartition(":")[2])

    def resp(self, daemon: Daemon, number: int) -> redis.Redis:
        client = redis.Redis(
            port=self.port(daemon, "resp"),
            password=f"resp-secret-{number}",
            socket_timeout=GIVE_UP_S,
            retry=Retry(NoBackoff(), 0),
        )
        self.addCleanup(client.close)
        return client

    def http(self, daemon: Daemon, token: str, *, path: str = "/v1/datasets", method: str = "GET") -> int:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port(daemon, 'http')}{path}",
            headers={"Authorization": f"Bearer {token}"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=GIVE_UP_S) as response:
                response.read()
                return int(response.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    def test_rotated(self) -> None:
        """The first client that sends the new secret is served, and from then on the old one is refused; a client
        that was connected before goes on."""
        daemon = self.begun()
        before = self.resp(daemon, 1)
        self.assertTrue(before.ping())
        self.assertEqual(self.http(daemon, "http-secret-1"), 200)
        self.assertEqual(self.http(daemon, "http-secret-2"), 401)
        with self.assertRaises(redis.AuthenticationError):
            self.resp(daemon, 2).ping()
        self.rotate(2)
        # The files were read less than a second ago.
        wait_until(lambda: self.http(daemon, "http-secret-2") == 200, "the new token")
        told = daemon.event("secrets_read_again")
        self.assertEqual(told["keys"], ["resp.password", "http.token", "http.admin_token"])
        self.assertTrue(self.resp(daemon, 2).ping())
        refresh = "/v1/datasets/products/refresh"
        self.assertEqual(self.http(daemon, "admin-secret-2", path=refresh, method="POST"), 202)
        self.assertEqual(self.http(daemon, "http-secret-2", path=refresh, method="POST"), 403)
        self.assertTrue(before.ping())
        for token in ("http-secret-1", "admin-secret-1"):
            self.assertEqual(self.http(daemon, token), 401)
        with self.assertRaises(redis.AuthenticationError):
            self.resp(daemon, 1).ping()
        for number in (1, 2):
            self.assertNotIn(f"-secret-{number}", daemon.output)

    def test_the_first_client_of_any_kind(self) -> None:
        """It is not refused, if nobody was within a second before, and counts as no failure."""
        command = "/v1/datasets/products/refresh"
        first: tuple[Callable[[Daemon], Any], ...] = (
            lambda daemon: self.resp(daemon, 2).ping(),
            lambda daemon: self.http(daemon, "http-secret-2"),
            lambda daemon: self.http(daemon, "http-secret-2", path="/"),
            lambda daemon: self.http(daemon, "admin-secret-2", path=command, method="POST"),
        )
        for ask, expected in zip(first, (True, 200, 200, 202), strict=True):
            daemon = self.begun()
            self.rotate(2)
            self.assertEqual(ask(daemon), expected)
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port(daemon, 'http')}/metrics") as answer:
                lines = answer.read().decode().splitlines()
            refused = [line for line in lines if 'reason="auth_failed"' in line]
            self.assertEqual({line.rpartition(" ")[2] for line in refused}, {"0.0"})
            daemon.kill()
            shutil.rmtree(self.mounted)

    def test_a_reload(self) -> None:
        """It replaces secrets at once, from whatever source; none is asked for or left out without a restart."""
        daemon = self.begun()
        self.rotate(2)
        self.assertIn("OK reloaded", self.admin("reload"))
        self.assertEqual(self.http(daemon, "http-secret-1"), 401)
        self.assertEqual(self.http(daemon, "http-secret-2"), 200)
        self.assertEqual(daemon.event("config_reloaded")["needs_restart"], [])
        (self.mounted / "resp").unlink()
        (self.mounted / "resp").write_text("")
        self.assertIn("at the next start: resp.password", self.admin("reload"))
        with self.assertRaises(redis.AuthenticationError):
            redis.Redis(port=self.port(daemon, "resp"), retry=Retry(NoBackoff(), 0)).ping()
        self.assertTrue(self.resp(daemon, 2).ping())
