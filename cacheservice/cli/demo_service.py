"""One service of the demo."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

from cacheservice.base.errors import DemoFailed, NoAnswer
from cacheservice.cli.child import Child, last_line
from cacheservice.cli.client import UnixSocket, ask_once
from cacheservice.cli.demo_parts import child, is_free, port_like
from cacheservice.cli.demo_texts import Place, Ports

_MOST_STARTS = 5
_ANSWER_LIMIT_S = 30.0


class DemoService(Child):
    """A service as a child process, on ports that are free.

    :param environment: the variables of its secrets.
    :param resources: ends the process.
    """

    def __init__(self, place: Place, environment: Mapping[str, str], resources: ExitStack) -> None:
        self.place = place
        self.ports = Ports(0, 0, 0)
        self._secrets = environment
        self._resources = resources

    @property
    def problem(self) -> str:
        """How the process has ended."""
        code = self._process.returncode if self._process is not None else None
        return f"the service has ended with exit code {code}; the last line of its log: {last_line(self.place.log)}"

    def start(self, usual: Ports, configuration: Callable[[Place, Ports], str]) -> None:
        """Start it on the usual ports, or on others if those are taken; wait until it is ready.

        :raises DemoFailed: if it does not become ready.
        """
        for tries_left in range(_MOST_STARTS - 1, -1, -1):
            self.ports = Ports(*map(port_like, usual))
            self.place.configuration.write_text(configuration(self.place, self.ports))
            self.place.log.write_bytes(b"")
            self.start_again()
            if self._is_ready():
                break
            # Another demo that starts at the same time may have taken a port that was free.
            if not tries_left or self.running or all(map(is_free, self.ports)):
                last = last_line(self.place.log)
                raise DemoFailed(f"the service did not become ready; the last line of its log: {last}")

    def start_again(self) -> None:
        """Start the process with the configuration that is there; its ports stay."""
        place = self.place
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CACHESERVICE_")}
        environment |= {"CACHESERVICE_CONFIG": str(place.configuration), **self._secrets}
        command = [sys.executable, "-m", "cacheservice", "run"]
        # Into a file: on the terminal the log would push the instructions off the screen within half a minute.
        with place.log.open("ab") as log:
            self._process = self._resources.enter_context(
                child(command, log, environment=environment, directory=place.directory)
            )

    def _is_ready(self) -> bool:
        """Wait; return True if the service becomes ready in time.

        It asks over the admin socket, because a port might belong to another demo.
        """
        socket_path = UnixSocket(str(self.place.admin_socket))
        limit = time.monotonic() + _ANSWER_LIMIT_S
        while time.monotonic() < limit and self.running:
            with suppress(NoAnswer):
                if ask_once(socket_path, "ready", 1.0) == "ready":
                    return True
            time.sleep(0.1)
        return False
