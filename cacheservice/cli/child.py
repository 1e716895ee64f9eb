"""A server that runs as a child process, which may end and be started again."""

from __future__ import annotations

from pathlib import Path
from subprocess import Popen


class Child:
    """The process of a server; `_process` is that of its last start, None before the first."""

    _process: Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process ID; None while it does not run."""
        return self._process.pid if self._process is not None and self.running else None


def last_line(log: Path) -> str:
    """Return the last line of a log, for an error."""
    *_, last = ["its log is empty", *log.read_text(errors="replace").splitlines()]
    return last
