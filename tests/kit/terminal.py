"""Runs a program in a terminal of a given size, as a person does, and shows what stands on its screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A program whose standard input, output and errors are a terminal; Ctrl-C reaches it as from a keyboard."""

    def __init__(
        self, command: Sequence[str], *, cwd: Path, environ: Mapping[str, str], columns: int = 80, lines: int = 40
    ) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environ, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  # one call into the kernel
        )  # fmt: skip
        os.close(theirs)
        self.raw = ""

    @property
    def text(self) -> str:
        """All that was written, without what moves and colours it."""
        return _ESCAPES.sub("", self.raw).replace("\r\n", "\n")

    @property
    def screen(self) -> str:
        """The last whole picture of a program that redraws the screen, each time from its upper left corner on."""
        pictures = self.raw.split("\x1b[H")
        return _ESCAPES.sub("", pictures[-2] if len(pictures) > 1 else "").replace("\r\n", "\n")

    def read_until_screen(self, wanted: str, limit_s: float) -> None:
        """Read until the screen shows `wanted`, a regular expression."""
        limit = time.monotonic() + limit_s
        while not re.search(wanted, self.screen):
            if not self._read(limit - time.monotonic()):
                raise AssertionError(f"{wanted!r} was not shown:\n{self.screen}")

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.write(self._ours, b"\x03")

    def wait(self, limit_s: float) -> int:
        """Read to the end; the exit code."""
        limit = time.monotonic() + limit_s
        while self._read(limit - time.monotonic()):
            pass
        return self.process.wait(max(0.1, limit - time.monotonic()))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1

    def _read(self, within_s: float) -> bool:
        """Whether something came."""
        if within_s <= 0 or not select.select([self._ours], [], [], within_s)[0]:
            return False
        with contextlib.suppress(OSError):  # EIO: the program has closed the terminal
            if read := os.read(self._ours, 65536):
                self.raw += read.decode("utf-8", "replace")
                return True
        return False
