"""Laws of the DSN that is read again after the server has refused a login."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from cacheservice.app import reload
from cacheservice.app.reload import Process, Reload
from cacheservice.base.errors import ConfigError, LoginRefused
from cacheservice.config import Settings
from cacheservice.ops.logs import Threshold
from tests.kit.refreshes import RefreshTestCase
from tests.kit.threads import ReactorWithThreads

FIRST, SECOND = "host=db password=first", "host=db password=second"


class Reads:
    """The parts that a reload reconfigures; the refreshes are real."""

    def __init__(self, refresh: Any) -> None:
        self.refresh = refresh
        self.dsns: list[str] = []

    def connect_to(self, dsn: SecretStr, connect_timeout_s: float) -> None:
        self.dsns.append(dsn.get_secret_value())


class RefusedLogins(RefreshTestCase):
    def setUp(self) -> None:
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        self.file = folder / "dsn"
        self.file.write_text(FIRST + "\n", encoding="utf-8")
        self.patch(os, "environ", os.environ | {"CACHESERVICE_POSTGRES__DSN_FILE": str(self.file)})
        self.reactor = ReactorWithThreads()
        self.reactor.advance(1000)
        self.world = self.started()
        self.world.database.last.complete()
        self.reads = Reads(self.world.service)
        table = {"name": "products", "query": "SELECT 1 AS id", "key": "id"}
        settings = Settings.model_validate({"postgres": {"dsn": FIRST}, "datasets": {"products": table}})
        process = Process(self.reactor, Threshold("info"), self.world.log)  # type: ignore[arg-type]
        self.reload = Reload(settings, self.world.cache, self.reads, object(), process)  # type: ignore[arg-type]

    def refuse(self, *, later_s: float = 0.0) -> None:
        """The server refuses the login of a refresh, so much later, and the read of the file ends."""
        self.reactor.advance(later_s)
        self.world.service.refresh_now("products")
        self.world.database.last.fail(LoginRefused("password authentication failed", "28P01"))
        self.reactor.pool.run()

    def logged(self) -> list[str]:
        return self.world.log.names("dsn_read_again", "internal_error")

    def test_a_new_secret(self) -> None:
        """A new secret is used at once: sessions open with it, and all datasets are read."""
        self.file.write_text(SECOND, encoding="utf-8")
        reads = len(self.world.database.reads)
        self.refuse()
        self.assertEqual((self.reads.dsns, self.logged()), ([SECOND], ["dsn_read_again"]))
        self.assertEqual(len(self.world.database.reads), reads + 2)
        self.assertFalse(self.world.database.last.result.called)
        self.world.database.last.complete()
        self.refuse(later_s=60)
        self.assertEqual(self.reads.dsns, [SECOND], "it is in use already")

    def test_the_same_secret(self) -> None:
        """Nothing happens while the file holds the secret that was refused, or one that is not a DSN, or is gone."""
        self.refuse()
        self.file.write_text("host='", encoding="utf-8")
        self.refuse(later_s=60)
        self.file.unlink()
        self.refuse(later_s=60)
        self.assertEqual((self.reads.dsns, self.logged()), ([], []))

    def test_every_five_seconds(self) -> None:
        """The file is read at most every 5 s, however many logins are refused."""
        self.refuse()
        self.file.write_text(SECOND, encoding="utf-8")
        self.refuse(later_s=4.9)
        self.assertEqual(self.reads.dsns, [])
        self.refuse(later_s=0.1)
        self.assertEqual(self.reads.dsns, [SECOND])

    def test_while_a_reload_runs(self) -> None:
        """The reload that runs reads the secret itself: it is not read again, and what was read before is dropped."""
        self.file.write_text(SECOND, encoding="utf-8")
        self.patch(reload, "load_with_file", self.invalid)
        self.reload.login_refused()
        reloaded = self.reload.reload()
        self.reload.login_refused()
        self.assertEqual(len(self.reactor.pool.calls), 2)
        self.reactor.pool.run()
        self.failureResultOf(reloaded, ConfigError)
        self.assertEqual((self.reads.dsns, self.logged()), ([], []))

    def invalid(self) -> Any:
        raise ConfigError(["the file is invalid"])

    def test_during_a_stop(self) -> None:
        """A secret that arrives once the service stops is not used, and nothing is logged."""
        self.file.write_text(SECOND, encoding="utf-8")
        self.reload.login_refused()
        self.world.cache.stop()
        self.stop(self.world)
        self.reactor.pool.run()
        self.assertEqual((self.reads.dsns, self.logged()), ([], []))

    def test_a_bug(self) -> None:
        """A bug is logged with its traceback, and the refreshes continue."""
        self.patch(reload.target, "problem", lambda _: 1 // 0)
        self.file.write_text(SECOND, encoding="utf-8")
        self.refuse()
        self.assertEqual(self.logged(), ["internal_error"])
        self.assertIn("ZeroDivisionError", self.world.log.named("internal_error")[0]["traceback"])
