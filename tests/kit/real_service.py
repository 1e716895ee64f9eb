"""Test cases of the service under twistd, asked over each of its ports."""

from __future__ import annotations

import json
import socket
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

from tests.kit.daemon import Daemon, DaemonTestCase
from tests.kit.http import Answer
from tests.kit.metrics import Series, of_text, place
from tests.kit.waiting import GIVE_UP_S, wait_until


class RealServiceTestCase(DaemonTestCase):
    """A service under twistd, on a real PostgreSQL."""

    def port_of(self, daemon: Daemon, name: str) -> int:
        return int(daemon.event("service_started")[name].rpartition(":")[2])

    def get(self, daemon: Daemon, path: str = "/metrics", method: str = "GET", **headers: str) -> Answer:
        with closing(HTTPConnection("127.0.0.1", self.port_of(daemon, "http"), timeout=GIVE_UP_S)) as client:
            client.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            return Answer(client.getresponse())

    def now(self, daemon: Daemon) -> Series:
        return of_text(self.get(daemon).body)

    def resp(self, daemon: Daemon, *requests: bytes, until_bytes: bytes) -> bytes:
        """Send them in one go, and read until what is the end of the last answer."""
        with socket.create_connection(("127.0.0.1", self.port_of(daemon, "resp")), timeout=GIVE_UP_S) as client:
            client.sendall(b"".join(requests) + b"ECHO the-end\r\n")
            received = b""
            while not received.endswith(until_bytes):
                part = client.recv(1 << 20)
                assert part, received[-200:]
                received += part
            return received


class ProbesTestCase(RealServiceTestCase):
    def livez(self, daemon: Daemon) -> tuple[int, Any]:
        answer = self.get(daemon, "/livez")
        return answer.status, json.loads(answer.body)

    def readyz(self, daemon: Daemon) -> tuple[int, Any]:
        answer = self.get(daemon, "/readyz")
        self.assertEqual(answer.headers["cache-control"], "no-store")
        return answer.status, json.loads(answer.body)

    def assert_not_ready(self, daemon: Daemon, reasons: dict[str, str]) -> None:
        """Both ports report it, and neither reports that it is not alive."""
        self.assertEqual(self.readyz(daemon), (503, {"status": "not ready", "not_ready": reasons}))
        words = " ".join(f"{name}:{state}" for name, state in reasons.items())
        self.assertEqual(daemon.ask("ready"), f"notready {words}")
        self.assertEqual((self.livez(daemon), daemon.ask("ruok")), ((200, {"status": "alive"}), "imok"))
        self.assertEqual(self.now(daemon)[place("cacheservice_ready")], 0)

    def wait_ready(self, daemon: Daemon) -> None:
        wait_until(lambda: self.readyz(daemon)[0] == 200, "readiness")
        self.assertEqual(self.readyz(daemon), (200, {"status": "ready"}))
        self.assertEqual(daemon.ask("ready"), "ready")
