"""Laws of errors of the file system: each names the setting, the path, the cause and the next step."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base import file_errors


class OfFolder(SynchronousTestCase):
    def test_a_file_where_a_folder_is_expected(self) -> None:
        """The real error of a file in the place of the folder, or above it, names the setting and the fix."""
        with TemporaryDirectory() as folder:
            file = Path(folder) / "x"
            file.write_text("")
            for path in (file, file / "below"):
                with self.assertRaises(OSError) as caught:
                    path.mkdir(parents=True, exist_ok=True)
                self.assertEqual(
                    file_errors.of_folder("persistence.directory", path, caught.exception),
                    f"persistence.directory: {path}: it, or a folder above it, is a file and not a folder; remove that "
                    "file, or name another folder",
                )

    def test_each_has_a_next_step(self) -> None:
        """Each error that a folder, a socket or a port may have has a cause and a next step on one line."""
        denied = OSError(errno.EACCES, os.strerror(errno.EACCES))
        self.assertEqual(
            file_errors.of_folder("persistence.directory", "/x", denied),
            f"persistence.directory: /x: permission denied; give the service's user (ID {os.geteuid()}) the right to "
            "write there, or name another folder",
        )
        self.assertIn("the right to write to /run/c, or set", file_errors.of_socket("/run/c/admin", denied))
        self.assertIn("set a port from 1024 on", file_errors.of_tcp(denied))
        for number in errno.errorcode:
            error = OSError(number, os.strerror(number))
            for line in (
                file_errors.of_folder("a", "/x", error),
                file_errors.of_socket("/x/y", error),
                file_errors.of_tcp(error),
            ):
                self.assertRegex(line, r"^.+; .+$")
        self.assertEqual(
            file_errors.of_socket("y", OSError("AF_UNIX path too long")), "af_unix path too long; set another"
        )
