"""Two processes that serve the same rows are the same for HTTP clients."""

from __future__ import annotations

import socket
from contextlib import closing

from tests.kit.daemon import Daemon, DaemonTestCase
from tests.kit.http import Answer, ask_on
from tests.kit.waiting import GIVE_UP_S

ROWS = 1000
PRODUCTS = """
[datasets.products]
query = "SELECT id, text FROM products ORDER BY {order}"
key = "id"
interval_s = 600
"""
PATHS = ["/v1/datasets/products", "/v1/datasets/products/rows/7", "/v1/datasets/products/rows/large"]
FORMS = [
    {"Accept": accept, "Accept_Encoding": coding}
    for accept in ("application/json", "application/x-ndjson")
    for coding in ("identity", "gzip")
]


class Replicas(DaemonTestCase):
    """Services with other hash seeds, which read the same table in another order."""

    def setUp(self) -> None:
        super().setUp()
        self.server.run_sql(
            f"CREATE TABLE products AS SELECT i::text AS id, 'text' AS text FROM generate_series(1, {ROWS}) AS i"
            " UNION ALL SELECT 'large', repeat('x', 5000)",
            self.database,
        )

    def service(self, name: str, seed: int) -> Daemon:
        directory = self.directory / name
        directory.mkdir()
        order = "id" if seed % 2 else "id DESC"
        configuration = self.configuration(PRODUCTS.format(order=order))
        daemon = Daemon(directory, configuration, environ={"PYTHONHASHSEED": str(seed)})
        self.addCleanup(daemon.kill)
        daemon.wait_until_ready()
        return daemon

    def ask(self, daemon: Daemon, path: str, **headers: str) -> Answer:
        port = int(daemon.event("service_started")["http"].rpartition(":")[2])
        with closing(socket.create_connection(("127.0.0.1", port), GIVE_UP_S)) as client:
            return ask_on(client, path, **headers)

    def tags(self, daemon: Daemon) -> dict[tuple[str, str, str], str]:
        """The tag of each representation that is served."""
        return {
            (path, *form.values()): answer.headers["etag"]
            for path in PATHS
            for form in FORMS
            if (answer := self.ask(daemon, path, **form)).status == 200
        }

    def test_tags_of_two_processes(self) -> None:
        """Tags are digests of the content: equal in every process, and accepted by the other one with a 304.

        After a restart without saved state the generations begin again; other rows under the same number have other
        tags.
        """
        one, two = self.service("one", 1), self.service("two", 2)
        tags = self.tags(one)
        self.assertEqual(len(tags), 2 * len(FORMS))
        self.assertEqual(len(set(tags.values())), len(tags) - 1, "identity and gzip of a small row are one form")
        self.assertEqual(self.tags(two), tags)
        for (path, accept, coding), tag in tags.items():
            answer = self.ask(two, path, Accept=accept, Accept_Encoding=coding, If_None_Match=tag)
            self.assertEqual((answer.status, answer.headers["etag"]), (304, tag), path)
        self.assertEqual(two.generation(), 1)
        two.end()
        self.server.run_sql("UPDATE products SET text = 'other'", self.database)
        restarted = self.service("restarted", 2)
        self.assertEqual(restarted.generation(), 1)
        self.assertFalse(set(self.tags(restarted).values()) & set(tags.values()))
