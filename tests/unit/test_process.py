"""Laws of the process: its arguments and its configuration file."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from cacheservice import config
from cacheservice.app.signals import log_file


class Arguments(SynchronousTestCase):
    def test_where_twistd_was_told_to_log(self) -> None:
        """It follows twistd's own options, however they are written; nothing for another program."""
        here = str(Path("x.log").absolute())
        for arguments, wanted in (
            (["/usr/bin/twistd", "-noy", "a.tac", "--pidfile="], None),
            (["twistd", "-noy", "a.tac", "--logfile", "x.log"], here),
            (["twistd", "--logfile=x.log", "--nodaemon", "-y", "a.tac"], here),
            (["twistd3", "-l", "x.log", "-ny", "a.tac"], here),
            (["twistd", "-noy", "a.tac", "-l", "-"], None),
            (["twistd", "-oy", "a.tac"], str(Path("twistd.log").absolute())),
            (["twistd", "--nonsense"], None),
            (["cacheservice", "run"], None),
            ([], None),
        ):
            self.assertEqual(log_file(arguments), wanted, arguments)


class ConfigurationFile(SynchronousTestCase):
    def test_a_file_without_a_name(self) -> None:
        """A file that was replaced where it is mounted from has no name any more, and is known by that."""
        directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, directory)
        path = Path(directory) / "cacheservice.toml"
        path.write_text("")
        self.assertFalse(config.config_file({"CACHESERVICE_CONFIG": str(path)}).is_replaced)
        with path.open() as opened:
            path.unlink()
            path.write_text("")  # its successor
            there: dict[str, Any] = {"CACHESERVICE_CONFIG": f"/proc/self/fd/{opened.fileno()}"}
            self.assertTrue(config.config_file(there).is_replaced)
        self.assertIsNone(config.config_file({"CACHESERVICE_CONFIG": "nowhere.toml"}).modified_at)
