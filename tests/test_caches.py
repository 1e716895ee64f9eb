"""The caches of docs/caches.md, as it sets them up, real ones in front of a real HTTP port."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from twisted.internet import reactor
from twisted.internet.task import deferLater

from tests.kit.datasets import rows_of
from tests.kit.http import Answer, ask_on
from tests.kit.http_port import PortTestCase, encoded
from tests.kit.paths import ROOT
from tests.kit.ports import free_port
from tests.kit.waiting import GIVE_UP_S

PAGE = (ROOT / "docs" / "caches.md").read_text(encoding="utf-8")
ROW, WHOLE = "/v1/datasets/products/rows/1", "/v1/datasets/products"
MODULES = ("mpm_event", "authz_core", "proxy", "proxy_http", "cache", "cache_disk")


class Behind(PortTestCase, ABC):
    """One cache in front. The origin's clock stands still; the data are 12.3 s old, the interval is 60 s."""

    language: ClassVar[str]
    caches_whole = True

    async def setUp(self) -> None:
        await super().setUp()
        self.publish(encoded({}), 1, self.prices)  # so that the service is ready
        self.closed = False
        self.directory = Path(tempfile.mkdtemp(prefix="cacheservice-test-"))
        self.addCleanup(shutil.rmtree, self.directory)
        os.chmod(self.directory, 0o777)  # Varnish and Apache work as other users
        self.listening = free_port()
        (block,) = re.findall(rf"^```{self.language}\n(.*?)^```$", PAGE, re.M | re.S)
        self.origin = self.port.getHost().port
        text = block.replace("127.0.0.1:8080", f"127.0.0.1:{self.origin}")
        self.log = self.directory / "log"
        self.start(self.command(text))
        give_up_at = time.monotonic() + GIVE_UP_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.listening)).close()
                return
            except ConnectionRefusedError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < give_up_at, self.log.read_text()
                await deferLater(reactor, 0.05)

    def start(self, command: list[str]) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory)
        self.addCleanup(self.process.wait)
        self.addCleanup(self.process.terminate)

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            await super().close()

    @abstractmethod
    def command(self, text: str) -> list[str]:
        """Return the command that starts it with the page's `text`."""

    def written(self, name: str, text: str) -> str:
        path = self.directory / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    def connect(self, receive_bytes: int = 0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.listening), GIVE_UP_S)

    async def read(self, path: str, **headers: str) -> tuple[Answer, int]:
        """The answer, and how often the service was asked for it."""
        before = self.products.counts.http.hits
        answer = await self.converse(lambda client: ask_on(client, path, **headers))
        return answer, self.products.counts.http.hits - before

    async def expired(self) -> None:
        """Wait until nothing of what was stored is fresh any more."""
        await deferLater(reactor, 3.5)

    async def check_hits(self) -> None:
        for path in (ROW, WHOLE):
            first, asked = await self.read(path)
            self.assertEqual((first.status, asked), (200, 1), path)
            # Some keep it for a second only, which may pass on a busy machine.
            tries = [await self.read(path) for _ in range(10)]
            self.assertEqual({(again.status, again.body) for again, _ in tries}, {(200, first.body)})
            hits = [again for again, asked in tries if not asked]
            self.assertEqual(bool(hits), path == ROW or self.caches_whole, path)
            again = (hits or [first])[0]
            self.assertGreaterEqual(int(again.headers["age"]), 12)
            tag = again.headers["etag"]
            same, _ = await self.read(path, If_None_Match=tag)
            self.assertEqual((same.status, same.headers["etag"]), (304, tag), path)

    async def check_asked_for(self) -> None:
        """An answer to ?max_age= that has nothing left of it is not answered from the store."""
        for _ in range(3):
            answer, asked = await self.read(f"{ROW}?max_age=12.9")
            self.assertEqual((answer.status, asked), (200, 1))
        generation = 17
        for path in (ROW, WHOLE):
            for query in ("max_age=0", "max_age=0.001", "max%5Fage=0.001", "%6dax_age=0"):
                for _ in range(2):  # the second might be answered with the stored first
                    generation += 1
                    row = b'{"id":"%d"}' % generation
                    self.publish(encoded({"1": row.decode()}), generation)
                    answer, asked = await self.read(f"{path}?{query}")
                    self.assertEqual((answer.status, asked), (200, 1), (path, query))
                    self.assertIn(row, answer.body, (path, query))

    async def check_age(self) -> None:
        """No cache keeps an answer past the moment at which the next refresh is due, however old it came."""
        self.clock.advance(46)  # 58.3 s old
        answer, asked = await self.read(ROW)
        self.assertEqual((answer.status, asked), (200, 1))
        await self.expired()
        self.publish(encoded({"1": '{"id":"new"}'}), 18)
        answer, asked = await self.read(ROW)
        self.assertEqual((answer.status, answer.body, asked), (200, b'{"id":"new"}', 1))

    async def check_variants(self) -> None:
        """A client that accepts gzip gets it, others get none, and NDJSON is not JSON."""
        self.publish(rows_of((b"%d" % number, b'{"id":%d}' % number) for number in range(2000)), 18)
        for headers in ({}, {"Accept_Encoding": "gzip"}, {"Accept": "application/x-ndjson"}, {}):
            answer, _ = await self.read(WHOLE, **headers)
            self.assertEqual(answer.headers.get("content-encoding"), "gzip" if "Accept_Encoding" in headers else None)
            kind = "application/x-ndjson" if "Accept" in headers else "application/json"
            self.assertEqual(answer.headers["content-type"].partition(";")[0], kind)

    async def check_a_dead_origin(self) -> None:
        """What has expired is not served when the service is gone, nor when it answers 503."""
        self.clock.advance(46)
        answer, _ = await self.read(ROW)
        self.assertEqual(answer.status, 200)
        await self.expired()
        refused = self.products.settings.model_copy(update={"on_expired": "refuse", "max_age_s": 1.0})
        self.products.change(refused)
        answer, _ = await self.read(ROW)
        self.assertEqual(answer.status, 503)
        await self.close()
        answer, _ = await self.read(ROW)
        self.assertGreaterEqual(answer.status, 500)


class Nginx(Behind):
    language = "nginx"

    def command(self, text: str) -> list[str]:
        text = text.replace("listen 80;", f"listen 127.0.0.1:{self.listening};")
        text = text.replace("/var/cache/nginx/cacheservice", str(self.directory / "store"))
        folders = "".join(
            f"{name}_temp_path {self.directory}/{name};\n"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        head = f"daemon off;\nuser root;\npid {self.directory}/pid;\nerror_log stderr;\nevents {{}}\n"
        if os.getuid():
            head = head.replace("user root;\n", "")
        path = self.written("nginx.conf", f"{head}http {{\naccess_log off;\n{folders}{text}}}\n")
        return ["/usr/sbin/nginx", "-p", str(self.directory), "-c", path]


class Varnish(Behind):
    language = "vcl"

    def command(self, text: str) -> list[str]:
        path = self.written("default.vcl", text.replace('.port = "8080"', f'.port = "{self.origin}"'))
        listen = f"127.0.0.1:{self.listening}"
        folder = str(self.directory / "varnish")
        return ["/usr/sbin/varnishd", "-F", "-j", "none", "-n", folder, "-a", listen, "-f", path, "-s", "malloc,16m"]


class HAProxy(Behind):
    language = "haproxy"
    caches_whole = False

    def command(self, text: str) -> list[str]:
        head = "defaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n\n"
        text = text.replace("bind :80\n", f"bind 127.0.0.1:{self.listening}\n")
        return ["/usr/sbin/haproxy", "-db", "-f", self.written("haproxy.cfg", head + text)]


class Apache(Behind):
    language = "apache"

    def command(self, text: str) -> list[str]:
        store = self.directory / "store"
        store.mkdir()
        store.chmod(0o777)
        modules = "".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n" for name in MODULES)
        head = f"ServerRoot {self.directory}\nServerName localhost\nListen 127.0.0.1:{self.listening}\n"
        head += f"PidFile {self.directory}/pid\nErrorLog {self.log}\nMutex posixsem\n{modules}"
        head += "User nobody\nGroup nogroup\n" if not os.getuid() else ""
        text = text.replace("/var/cache/apache2/cacheservice", str(store))
        return ["/usr/sbin/apache2", "-X", "-f", self.written("apache.conf", head + text)]


def _add_tests() -> None:
    """The same laws for each."""
    for each in (Nginx, Varnish, HAProxy, Apache):
        for name in ("hits", "asked_for", "age", "variants", "a_dead_origin"):
            setattr(each, f"test_{name}", getattr(Behind, f"check_{name}"))


_add_tests()
