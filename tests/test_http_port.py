"""Laws of the HTTP port, over real sockets; its clients are plain blocking ones in threads."""

from __future__ import annotations

import gc
import gzip
import io
import json
import random
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.client import HTTPException, HTTPResponse
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from cacheservice.cache.framing import bulk
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ports import client_socket
from cacheservice.ports.client_socket import Phase
from cacheservice.ports.http.bodies import PIECE_BYTES
from cacheservice.ports.http.request_head import MAX_HEAD_BYTES, MAX_HEADERS
from cacheservice.ports.throttle import Throttle
from tests.kit.datasets import MOMENT_WITH_MS, planned, rows_of
from tests.kit.http import Answer, ask_on, read_answer, read_to_the_end, statuses
from tests.kit.http_port import ROWS, PortTestCase, buffered, encoded
from tests.kit.waiting import GIVE_UP_S, until

PATHS = [
    "/livez",
    "/readyz",
    "/v1/datasets",
    "/v1/datasets/products",
    "/v1/datasets/products/rows/1",
    "/v1/datasets/products/rows/large",
    "/v1/datasets/products/status",
    "/v1/datasets/prices",
    "/v1/datasets/nothing",
    "/nothing",
]


class Routes(PortTestCase):
    async def test_the_list(self) -> None:
        """/v1/datasets lists each dataset with its state and where its data are."""
        answer = await self.ask("/v1/datasets")
        products, prices = answer.json()["datasets"]
        self.assertEqual(
            products,
            {
                "name": "products",
                "state": "fresh",
                "rows": len(ROWS),
                "bytes": sum(len(key.encode()) + len(document.encode()) for key, document in ROWS.items()),
                "generation": 17,
                "as_of": "2026-01-02T03:04:05.678000Z",
                "age_s": 12.3,
                "links": {
                    "self": "/v1/datasets/products",
                    "row": "/v1/datasets/products/rows/{key}",
                    "status": "/v1/datasets/products/status",
                },
            },
        )
        self.assertEqual((prices["name"], prices["state"], prices["age_s"]), ("prices", "never_loaded", None))

    async def test_a_whole_dataset(self) -> None:
        """It is one JSON object of every key, whatever is in it, with its document."""
        answer = await self.ask("/v1/datasets/products")
        self.assertEqual((answer.status, answer.headers["content-type"]), (200, "application/json"))
        self.assertEqual(answer.json(), {key: json.loads(document) for key, document in ROWS.items()})

    async def test_a_whole_dataset_as_lines(self) -> None:
        """NDJSON has one line a row, an object of the key and the document, even if the document holds line ends."""
        answer = await self.ask("/v1/datasets/products", Accept="application/x-ndjson")
        self.assertEqual(answer.headers["content-type"], "application/x-ndjson")
        lines = answer.body.splitlines()
        self.assertEqual(len(lines), len(ROWS))
        rows = {row["key"]: row["value"] for row in map(json.loads, lines)}
        self.assertEqual(rows, {key: json.loads(document) for key, document in ROWS.items()})

    async def test_no_row_at_all(self) -> None:
        """A dataset without rows is an empty object, or no line."""
        self.publish(encoded({}), 1, self.prices)
        self.assertEqual((await self.ask("/v1/datasets/prices")).json(), {})
        self.assertEqual((await self.ask("/v1/datasets/prices", Accept="application/x-ndjson")).body, b"")

    async def test_rows(self) -> None:
        """A row is its document, byte for byte; the key is decoded from the path, where it may hold anything."""
        paths = {
            "1": "1",
            "2": "%32",
            "a/b:c d%": "a/b:c%20d%25",
            'quo"te\\\n\x01é': "quo%22te%5C%0A%01%c3%A9",
            "": "",
            "large": "large",
        }
        for key, path in paths.items():
            answer = await self.ask(f"/v1/datasets/products/rows/{path}")
            self.assertEqual((answer.status, answer.body), (200, ROWS[key].encode()))
        self.assertEqual((await self.ask("/v1/datasets/products/rows/a%2Fb:c%20d%25")).body, b'{"id":3}')

    async def test_a_rows_own_question_mark(self) -> None:
        """What follows a question mark is not part of the key."""
        self.assertEqual((await self.ask("/v1/datasets/products/rows/1?max_age=13")).status, 200)
        await self.assert_problem("/v1/datasets/products/rows/1%3Fx=2", 404, "no row '1?x=2'")

    async def test_status(self) -> None:
        """A dataset's status is its part of the status port's json."""
        status = (await self.ask("/v1/datasets/products/status")).json()
        self.assertEqual((status["state"], status["generation"], status["next_refresh_in_s"]), ("fresh", 17, 47.7))
        self.assertEqual((await self.ask("/v1/datasets/prices/status")).json()["state"], "never_loaded")

    async def test_probes(self) -> None:
        """livez is 200 whatever happens; readyz is 503 with each dataset that is why, then 200."""
        answer = await self.ask("/livez")
        self.assertEqual((answer.status, answer.json()), (200, {"status": "alive"}))
        answer = await self.ask("/readyz")
        self.assertEqual(
            (answer.status, answer.json()), (503, {"status": "not ready", "not_ready": {"prices": "never_loaded"}})
        )
        self.publish(encoded({}), 1, self.prices)
        answer = await self.ask("/readyz")
        self.assertEqual((answer.status, answer.json()), (200, {"status": "ready"}))

    async def test_not_found(self) -> None:
        """An unknown path, dataset or row is a 404 that states which it is."""
        await self.assert_problem("/v1", 404, "nothing at this path")
        await self.assert_problem("/v1/datasets/products/", 404, "nothing at this path; leave out the slash at its end")
        for path in ("/v1/datasets/", "/v1/datasets//rows/1", "/v1/datasets//status"):
            await self.assert_problem(path, 404, "nothing at /v1/datasets/ without a name; GET /v1/datasets, without")
        await self.assert_problem("/v1/datasets/products/columns", 404, "nothing at this path")
        await self.assert_problem("/v1/datasets/nothing", 404, "unknown dataset 'nothing'")
        await self.assert_problem("/v1/datasets/nothing/rows/1", 404, "unknown dataset 'nothing'")
        await self.assert_problem("/v1/datasets/nothing/status", 404, "unknown dataset 'nothing'")
        await self.assert_problem("/v1/datasets/products/rows/3", 404, "products has no row '3'")

    async def test_other_methods(self) -> None:
        """A method other than GET or HEAD gets 405 with the allowed ones; the connection lives on."""

        def conversation(client: socket.socket) -> list[Answer]:
            asked = [
                ask_on(client, path, method) for path in PATHS[:8] for method in ("POST", "DELETE", "OPTIONS", "get")
            ]
            return [*asked, ask_on(client, "/livez")]

        *answers, last = await self.converse(conversation)
        self.assertEqual({(answer.status, answer.headers["allow"]) for answer in answers}, {(405, "GET, HEAD")})
        self.assertEqual(last.status, 200)

    async def test_not_loaded(self) -> None:
        """A dataset that is not loaded is 503, with the seconds to its next try; at least one."""
        for path in ("/v1/datasets/prices", "/v1/datasets/prices/rows/1"):
            answer = await self.assert_problem(path, 503, "prices has not been loaded yet")
            self.assertEqual(answer.headers["retry-after"], "16")
        for next_at in (self.clock.seconds(), None):
            planned(self.prices, next_at)
            self.assertEqual((await self.ask("/v1/datasets/prices")).headers["retry-after"], "1")

    async def test_bad_encoding(self) -> None:
        """A broken escape and what is not UTF-8 are 400, in the dataset's name as in the key."""
        for part in ("%", "%4", "%zz", "a%1"):
            await self.assert_problem(f"/v1/datasets/products/rows/{part}", 400, "hexadecimal digits")
            await self.assert_problem(f"/v1/datasets/{part}", 400, "hexadecimal digits")
        for part in ("%ff", "%c3", "%ed%a0%80"):
            await self.assert_problem(f"/v1/datasets/products/rows/{part}", 400, "not UTF-8")
            await self.assert_problem(f"/v1/datasets/{part}/status", 400, "not UTF-8")

    async def test_an_absolute_target(self) -> None:
        """A target as one would send it to a proxy is taken (RFC 9112, 3.2.2)."""
        self.assertEqual((await self.ask("http://other:80/v1/datasets/products/rows/1")).status, 200)
        self.assertEqual((await self.ask("HTTPS://other")).status, 200)
        self.assertEqual((await self.ask("*", "OPTIONS")).status, 404)

    async def test_a_bug_is_500_and_logged_once(self) -> None:
        """An error that nobody expected is answered without its details and logged with its traceback; we go on."""
        self.cache.not_ready = lambda: 1 / 0  # type: ignore[assignment,method-assign]
        await self.assert_problem("/readyz", 500, "an internal error")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual((await self.ask("/livez")).status, 200)


class Expired(PortTestCase):
    on_expired = "refuse"

    async def test_refused_once_expired(self) -> None:
        """With on_expired = "refuse" a snapshot past max_age_s is 503 with its age and the limit, its status is not."""
        self.clock.advance(180.0 - 12.3)
        self.assertEqual((await self.ask("/v1/datasets/products")).status, 200)
        self.clock.advance(20.0)
        for path in ("/v1/datasets/products", "/v1/datasets/products/rows/1", "/v1/datasets/products/rows/none"):
            answer = await self.assert_problem(path, 503, "products is 200 s old, limit 180 s")
            self.assertIn("retry-after", answer.headers)
        self.assertEqual((await self.ask("/v1/datasets/products/status")).json()["state"], "expired")


class Caching(PortTestCase):
    async def test_headers(self) -> None:
        """A dataset's responses state their age and how long they may be kept."""
        for path in ("/v1/datasets/products", "/v1/datasets/products/rows/1"):
            headers = (await self.ask(path)).headers
            is_row = "rows" in path
            self.assertRegex(headers["etag"], r'^"[0-9a-f]{32}"$' if is_row else r'^W/"[0-9a-f]{32}"$')
            self.assertEqual(headers["age"], "13")
            self.assertEqual(headers["last-modified"], "Fri, 02 Jan 2026 03:04:05 GMT")
            self.assertEqual(headers["cache-control"], "max-age=60, stale-if-error=120")
            self.assertEqual(headers["x-cache-generation"], "17")
            self.assertEqual(headers["vary"], "Accept-Encoding" if is_row else "Accept, Accept-Encoding")
            self.assertIn("date", headers)

    async def test_headers_follow_the_time_and_the_generation(self) -> None:
        """What was prepared for one second or one generation is not sent in the next."""
        first = await self.ask("/v1/datasets/products/rows/1")
        self.clock.advance(1.0)
        second = await self.ask("/v1/datasets/products/rows/1")
        self.assertEqual((second.headers["age"], second.headers["etag"]), ("14", first.headers["etag"]))
        self.publish(encoded(ROWS), 18)
        third = await self.ask("/v1/datasets/products/rows/1")
        self.assertEqual((third.headers["age"], third.headers["x-cache-generation"]), ("0", "18"))
        self.assertEqual(third.headers["etag"], first.headers["etag"])

    async def test_tags_are_of_content(self) -> None:
        """A row's tag changes with the row alone, a dataset's with any row: equal in every process and row order."""
        paths = ["/v1/datasets/products", "/v1/datasets/products/rows/1", "/v1/datasets/products/rows/2"]
        table = {b"%d" % n: b'{"id":%d}' % n for n in range(2000)}

        async def tags() -> list[str]:
            return [(await self.ask(path)).headers["etag"] for path in paths]

        self.publish(rows_of(table.items()), 18)
        first = await tags()
        self.port.factory = self.make_factory()  # as after a restart
        self.addCleanup(self.port.factory.close_clients)
        self.publish(rows_of(reversed(table.items())), 19)
        self.assertEqual(await tags(), first)
        self.publish(rows_of((table | {b"2": b"{}"}).items()), 20)
        second = await tags()
        self.assertEqual([before == after for before, after in zip(first, second, strict=True)], [False, True, False])
        self.publish(rows_of(table.items()), 21)
        self.assertEqual(await tags(), first)

    async def test_a_caches_sums(self) -> None:
        """max-age less Age is what is left to the refresh; with stale-if-error, to expiry; none is ever negative."""
        self.clock.advance(500)
        headers = (await self.ask("/v1/datasets/products")).headers
        self.assertEqual((headers["age"], headers["cache-control"]), ("513", "max-age=60, stale-if-error=120"))

    async def test_a_database_clock_that_runs_ahead(self) -> None:
        """Last-Modified is never after Date (RFC 9110, 8.8.2.1)."""
        ahead = datetime.now(UTC) + timedelta(days=1)
        self.products.publish(Snapshot(18, encoded(ROWS), ahead, self.clock.seconds(), "1:1:"))
        headers = (await self.ask("/v1/datasets/products")).headers
        self.assertEqual(headers["last-modified"], headers["date"])

    async def test_each_representation_has_its_own_tag(self) -> None:
        """JSON, NDJSON and their compressed forms have tags of their own."""
        self.publish(rows_of((b"%d" % n, b'{"id":%d}' % n) for n in range(1000)), 18)
        tags = set()
        for accept in ("application/json", "application/x-ndjson"):
            for coding in ("identity", "gzip"):
                answer = await self.ask("/v1/datasets/products", Accept=accept, Accept_Encoding=coding)
                self.assertEqual(answer.headers.get("content-encoding"), "gzip" if coding == "gzip" else None)
                tags.add(answer.headers["etag"])
        self.assertEqual(len(tags), 4)

    async def test_not_modified(self) -> None:
        """A client that has the current tag, alone, weak or in a list, gets 304 with the same headers and no body."""
        for path in ("/v1/datasets/products", "/v1/datasets/products/rows/1", "/v1/datasets/products/rows/large"):
            for more in ({}, {"Accept_Encoding": "gzip"}):
                full = await self.ask(path, **more)
                tag = full.headers["etag"]
                opaque = tag.removeprefix("W/")
                for header in (tag, opaque, f"W/{opaque}", "*", f'"x,y", {tag}', f'W/"other" ,W/{opaque},"z"'):

                    def conversation(client: socket.socket) -> list[Answer]:
                        first = ask_on(client, path, If_None_Match=header, **more)  # noqa: B023  # run at once
                        return [first, ask_on(client, "/livez")]

                    answer, after = await self.converse(conversation)
                    self.assertEqual((answer.status, answer.body, after.status), (304, b"", 200), header)
                    kept = set(full.headers) - {
                        "content-type",
                        "content-length",
                        "content-encoding",
                        "transfer-encoding",
                        "date",
                    }
                    self.assertEqual({n: answer.headers[n] for n in kept}, {n: full.headers[n] for n in kept})
                    self.assertFalse({"content-length", "transfer-encoding"} & set(answer.headers))
                for header in ('"other"', opaque.strip('"'), tag[:-1], "", f'"{opaque}', opaque[:-2] + 'x"'):
                    self.assertEqual((await self.ask(path, If_None_Match=header, **more)).status, 200, header)

    async def test_not_modified_since(self) -> None:
        """If-Modified-Since is compared exactly, in all three forms of a date, and only without If-None-Match.

        After a rollback the date goes back; with a comparison by order a client would keep what was taken back.
        """
        path = "/v1/datasets/products/rows/1"
        at = MOMENT_WITH_MS.replace(microsecond=0)
        same, before = format_datetime(at, usegmt=True), format_datetime(at - timedelta(seconds=1), usegmt=True)
        for header in (
            same,
            "Friday, 02-Jan-26 03:04:05 GMT",
            "Fri Jan  2 03:04:05 2026",
        ):
            self.assertEqual((await self.ask(path, If_Modified_Since=header)).status, 304, header)
        later = "Sat, 03 Jan 2026 00:00:00 GMT"
        for header in (before, later, "yesterday", "", "Fri, 02 Jan 9999999 03:04:05 GMT", "0"):
            self.assertEqual((await self.ask(path, If_Modified_Since=header)).status, 200, header)
        self.assertEqual((await self.ask(path, If_Modified_Since=same, If_None_Match='"other"')).status, 200)

    async def test_two_contents_of_one_second(self) -> None:
        """A Last-Modified that two contents had proves nothing from then on; that of a renewed content stays."""
        path = "/v1/datasets/products/rows/1"
        date = (await self.ask(path)).headers["last-modified"]
        served = self.products.snapshot
        assert served is not None
        self.products.renew(replace(served, as_of=MOMENT_WITH_MS + timedelta(seconds=60), content_since=MOMENT_WITH_MS))
        self.assertEqual((await self.ask(path)).headers["last-modified"], date)
        self.assertEqual((await self.ask(path, If_Modified_Since=date)).status, 304)
        for generation, microsecond in ((18, 700_000), (19, MOMENT_WITH_MS.microsecond)):
            as_of = MOMENT_WITH_MS.replace(microsecond=microsecond)
            snapshot = Snapshot(generation, encoded(ROWS), as_of, self.clock.seconds(), "1:1:")
            self.products.publish(snapshot)
            answer = await self.ask(path, If_Modified_Since=date)
            self.assertEqual((answer.status, answer.headers["last-modified"]), (200, date))

    async def test_a_digest_whose_client_goes(self) -> None:
        """Of several that ask for a large dataset at once, one computes its tag; if it goes, another one does."""
        self.publish(rows_of((b"%d" % n, b'{"id":%d}' % n) for n in range(60_000)), 18)
        first = self.connect()
        first.sendall(b"GET /v1/datasets/products HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: self.factory.clients)
        others = [self.ask("/v1/datasets/products", "HEAD") for _ in range(3)]
        answers = gatherResults([Deferred.fromCoroutine(each) for each in others])
        first.close()
        self.assertEqual(len({answer.headers["etag"] for answer in await answers}), 1)

    async def test_preconditions(self) -> None:
        """If-Match and If-Unmodified-Since that do not hold are 412, in the order and the comparisons of RFC 9110, 13.

        A dataset's tag is weak, and so meets no If-Match but ``*``.
        """
        row, whole = "/v1/datasets/products/rows/1", "/v1/datasets/products"
        tag = (await self.ask(row)).headers["etag"]
        weak = (await self.ask(whole)).headers["etag"]
        date = format_datetime(MOMENT_WITH_MS.replace(microsecond=0), usegmt=True)
        before = "Thu, 01 Jan 2026 00:00:00 GMT"
        for method in ("GET", "HEAD"):
            for path, status, headers in (
                (row, 200, {"If_Match": tag}),
                (row, 200, {"If_Match": f'"x", {tag}'}),
                (row, 200, {"If_Match": "*"}),
                (whole, 200, {"If_Match": "*"}),
                (row, 412, {"If_Match": '"x"'}),
                (row, 412, {"If_Match": f"W/{tag}"}),
                (row, 412, {"If_Match": ""}),
                (whole, 412, {"If_Match": weak}),
                (whole, 412, {"If_Match": weak.removeprefix("W/")}),
                (row, 200, {"If_Unmodified_Since": date}),
                (row, 200, {"If_Unmodified_Since": "Sat, 03 Jan 2026 00:00:00 GMT"}),
                (row, 200, {"If_Unmodified_Since": "yesterday"}),
                (row, 412, {"If_Unmodified_Since": before}),
                (row, 200, {"If_Unmodified_Since": before, "If_Match": tag}),
                (row, 304, {"If_Match": tag, "If_None_Match": tag}),
                (row, 412, {"If_Match": '"x"', "If_None_Match": tag}),
                (row, 304, {"If_Unmodified_Since": date, "If_Modified_Since": date}),
                (whole + "/rows/none", 404, {"If_Match": '"x"'}),
                (whole + "/status", 412, {"If_Match": '"x"'}),
                (whole + "/status", 200, {"If_Match": "*", "If_Unmodified_Since": before}),
                ("/v1/datasets/prices", 503, {"If_Match": '"x"'}),
            ):
                answer = await self.ask(path, method, **headers)
                self.assertEqual(answer.status, status, (method, path, headers))

    async def test_parameters(self) -> None:
        """A parameter that is not known is 400 on every path, and names the one that was meant or that there is."""
        for path in ("/v1/datasets/products", "/v1/datasets/products/rows/1"):
            for method in ("GET", "HEAD"):
                self.assertEqual((await self.ask(f"{path}?maxage=1", method)).status, 400)
            for query in ("maxage=1", "max-age=1", "Max_Age=1", "max_age=13&maxage"):
                await self.assert_problem(f"{path}?{query}", 400, "did you mean 'max_age'?")
            await self.assert_problem(
                f"{path}?fresh=1", 400, "unknown query parameter 'fresh'; this path takes max_age, min_generation"
            )
            self.assertEqual((await self.ask(f"{path}?")).status, 200)
            self.assertEqual((await self.ask(f"{path}?max%5fage=13")).status, 200)
        for path in ("/v1/datasets", "/v1/datasets/products/status", "/v1/datasets/products/why", "/livez", "/readyz",
                     "/v1/datasets/products/history", "/", "/events"):  # fmt: skip
            await self.assert_problem(
                f"{path}?max_age=1", 400, "unknown query parameter 'max_age'; this path takes none"
            )

    async def test_a_missing_row_is_missing(self) -> None:
        """A condition does not hide that there is no such row."""
        self.assertEqual((await self.ask("/v1/datasets/products/rows/none", If_None_Match="*")).status, 404)

    async def test_head_is_get_without_the_body(self) -> None:
        """HEAD has GET's status and headers everywhere, and the connection goes on after it."""
        self.publish(rows_of((b"%d" % n, b'{"id":%d}' % n) for n in range(20_000)), 18)
        for path in [*PATHS, "/v1/datasets/products/rows/2", "/v1/datasets/products?max_age=x"]:
            for more in ({}, {"Accept_Encoding": "gzip"}, {"Accept": "application/x-ndjson"}, {"If_None_Match": "*"}):

                def conversation(client: socket.socket) -> tuple[Answer, Answer]:
                    return ask_on(client, path, "HEAD", **more), ask_on(client, path, **more)  # noqa: B023

                head, get = await self.converse(conversation)
                for answer in (head, get):
                    answer.headers.pop("date")
                self.assertEqual((head.status, head.headers, head.body), (get.status, get.headers, b""), (path, more))


class Negotiation(PortTestCase):
    async def test_what_is_acceptable(self) -> None:
        """The best of what the client takes is sent; 406 lists what there is."""
        for accept, content_type in {
            "": "application/json",
            "*/*": "application/json",
            "application/*": "application/json",
            "application/x-ndjson": "application/x-ndjson",
            "application/json;q=0.5, application/x-ndjson": "application/x-ndjson",
            "application/json;q=0, */*": "application/x-ndjson",
            "text/html, */*;q=0.1": "application/json",
        }.items():
            answer = await self.ask("/v1/datasets/products", Accept=accept)
            self.assertEqual((answer.status, answer.headers["content-type"]), (200, content_type), accept)
        for accept in ("text/html", "application/json;q=0", "application/x-ndjson;q=0.0, application/json;q=0.000"):
            await self.assert_problem(
                "/v1/datasets/products", 406, "application/json or application/x-ndjson", Accept=accept
            )
        await self.assert_problem(
            "/v1/datasets/products/rows/1", 406, "application/json", Accept="application/x-ndjson"
        )
        await self.assert_problem("/v1/datasets", 406, "application/json", Accept="text/html")
        self.assertEqual((await self.ask("/readyz", Accept="text/html")).status, 503)

    async def test_what_may_be_compressed(self) -> None:
        """Small bodies stay plain, unless the client accepts only gzip; a client that accepts neither gets an error."""
        small, large = "/v1/datasets/products/rows/1", "/v1/datasets/products/rows/large"
        for path, accept, coding in (
            (small, "gzip", None),
            (large, "gzip", "gzip"),
            (large, "gzip;q=0", None),
            (large, "*", None),
            (large, "br, x-gzip;q=0.5", "gzip"),
            (large, "gzip;q=0.5, identity", None),
            (small, "gzip, identity;q=0", "gzip"),
            (small, "*;q=0, gzip", "gzip"),
        ):
            answer = await self.ask(path, Accept_Encoding=accept)
            self.assertEqual((answer.status, answer.headers.get("content-encoding")), (200, coding), accept)
            body = gzip.decompress(answer.body) if coding else answer.body
            self.assertEqual(body.decode(), ROWS[path.rpartition("/")[2]])
        for accept in ("identity;q=0", "*;q=0", "br, identity;q=0, gzip;q=0"):
            await self.assert_problem(large, 406, "plain or as gzip", Accept_Encoding=accept)


class MaxAge(PortTestCase):
    async def setUp(self) -> None:
        await super().setUp()
        self.subscriptions = self.cache.events.subscription_count

    async def until_waiting(self, requests: int) -> None:
        """Until so many requests wait for an event: each has three subscriptions."""
        await until(lambda: self.cache.events.subscription_count == self.subscriptions + 3 * requests)

    async def test_fresh_enough(self) -> None:
        """What is young enough is answered at once and asks for nothing."""
        for path in ("/v1/datasets/products?max_age=13", "/v1/datasets/products/rows/1?&max_age=12.5&"):
            self.assertEqual((await self.ask(path)).status, 200)
        self.assertEqual(self.refreshes.asked, [])

    async def test_a_generation(self) -> None:
        """A request for a generation is answered at once if it is served, or else by the publish that reaches it."""
        for path in ("/v1/datasets/products", "/v1/datasets/products/rows/1"):
            for wanted in (0, 1, 17):
                answer = await self.ask(f"{path}?min_generation={wanted}&max_age=13")
                self.assertEqual((answer.status, answer.headers["x-cache-generation"]), (200, "17"))
                answer = await self.ask(f"{path}?min_generation={wanted}", "HEAD")
                self.assertEqual((answer.status, answer.headers["age"], answer.body), (200, "13", b""))
        asking = [self.ask(f"/v1/datasets/products/rows/1?min_generation={wanted}") for wanted in (18, 19)]
        waiting = [Deferred.fromCoroutine(each) for each in asking]
        await self.until_waiting(2)
        self.publish(encoded({"1": "18"}), 18)
        self.assertEqual((await waiting[0]).body, b"18")
        self.assertFalse(waiting[1].called)
        self.publish(encoded({"1": "23"}), 23)
        self.assertEqual((await waiting[1]).body, b"23")
        self.assertEqual(self.refreshes.asked, [], "generations come from elsewhere")

    async def test_a_generation_and_an_age(self) -> None:
        """Both hold for the snapshot that is served: a later generation may be an older one, after a rollback."""
        waiting = Deferred.fromCoroutine(self.ask("/v1/datasets/products/rows/1?min_generation=19&max_age=5"))
        await until(lambda: self.refreshes.asked)
        self.publish(encoded({"1": "18"}), 18)
        self.clock.advance(1.0)
        old = Snapshot(19, encoded({"1": "19"}), MOMENT_WITH_MS, self.clock.seconds() - 30.0, "1:1:")
        self.products.publish(old)
        await until(lambda: len(self.refreshes.asked) == 2)
        self.assertFalse(waiting.called)
        self.publish(encoded({"1": "20"}), 20)
        self.assertEqual((await waiting).body, b"20")

    async def test_a_generation_that_does_not_come(self) -> None:
        """At the dataset's timeout_s it is 503 with both generations; a removed dataset is 404 at once."""
        late = Deferred.fromCoroutine(self.ask("/v1/datasets/products?min_generation=18"))
        never = Deferred.fromCoroutine(self.ask("/v1/datasets/prices/rows/1?min_generation=1"))
        await self.until_waiting(2)
        self.clock.advance(self.products.settings.timeout_s)
        problem = (answer := await late).json()
        self.assertEqual((answer.status, problem["generation"], problem["min_generation"]), (503, 17, 18))
        self.assertIn("products is at generation 17; min_generation=18 was requested", problem["detail"])
        self.assertIn("retry-after", answer.headers)
        self.assertIn("has not been loaded yet", (await never).json()["detail"])
        self.assertEqual((self.products.counts.http.stale, self.prices.counts.http.loading), (1, 1))
        gone = Deferred.fromCoroutine(self.ask("/v1/datasets/products?min_generation=18"))
        await self.until_waiting(1)
        self.cache.declare([self.prices.settings])
        self.assertEqual((await gone).status, 404)

    async def test_waits_for_a_refresh(self) -> None:
        """A request for younger data waits until they are published, and gets them; all that wait get the same."""
        path = "/v1/datasets/products/rows/1?max_age="
        asking = [self.ask(path + limit) for limit in ("5", "0", "5.5")]
        answers = gatherResults([Deferred.fromCoroutine(each) for each in asking])
        await until(lambda: len(self.refreshes.asked) == 3)
        self.assertEqual(sorted(self.refreshes.asked), [("products", 1012.3 - limit) for limit in (5.5, 5, 0)])
        self.clock.advance(2)
        self.assertFalse(answers.called)
        self.publish(encoded({"1": '{"id":1,"name":"mallet"}'}), 18)
        for answer in await answers:
            self.assertEqual((answer.status, answer.headers["age"]), (200, "0"))
            self.assertEqual(answer.json()["name"], "mallet")

    async def test_how_long_it_may_be_stored(self) -> None:
        """An answer to ?max_age= is stored for what is left of that, never for the interval, and not used stale."""
        for asked, lifetime_s in (("12.5", 0), ("13.2", 0), ("13.3", 1), ("40", 27), ("1000", 60)):
            for path in ("/v1/datasets/products", "/v1/datasets/products/rows/1"):
                for headers in ({}, {"Accept_Encoding": "gzip"}, {"If_None_Match": "*"}):
                    answer = await self.ask(f"{path}?max_age={asked}", **headers)
                    self.assertEqual(answer.headers["cache-control"], f"max-age={lifetime_s}, must-revalidate")
        plain = await self.ask("/v1/datasets/products")
        self.assertEqual(plain.headers["cache-control"], "max-age=60, stale-if-error=120")

    async def test_not_in_time(self) -> None:
        """At the dataset's timeout it is 503 with the age and the requested limit, or that nothing is loaded."""
        late = Deferred.fromCoroutine(self.ask("/v1/datasets/products?max_age=5"))
        never = Deferred.fromCoroutine(self.ask("/v1/datasets/prices?max_age=5"))
        await until(lambda: len(self.refreshes.asked) == 2)
        self.clock.advance(30)
        answer = await late
        self.assertEqual((answer.status, answer.headers["content-type"]), (503, "application/problem+json"))
        problem = answer.json()
        self.assertEqual((problem["age_s"], problem["max_age_s"]), (42.3, 5))
        self.assertIn("products is 42.3 s old; max_age=5 was requested", problem["detail"])
        self.assertIn("retry-after", answer.headers)
        self.assertIn("not been loaded", (await never).json()["detail"])

    async def test_a_client_that_goes_frees_all(self) -> None:
        """The timer, the watch and the channel of a client that disconnects while it waits are gone with it."""
        client = self.connect()
        channel = weakref.WeakSet[Any]()
        client.sendall(b"GET /v1/datasets/products?max_age=5 HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: self.refreshes.asked)
        channel.update(self.factory.clients)
        self.assertEqual(len(channel), 1)
        client.close()
        await until(lambda: not self.factory.clients)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        await until(lambda: gc.collect() >= 0 and not channel)
        self.publish(encoded(ROWS), 18)

    async def test_the_next_request_waits(self) -> None:
        """A pipelined request behind one that waits is answered after it."""

        def conversation(client: socket.socket) -> list[int]:
            client.sendall(b"GET /v1/datasets/products?max_age=5 HTTP/1.1\r\nHost: x\r\n\r\n")
            client.sendall(b"GET /v1/datasets/nothing HTTP/1.1\r\nHost: x\r\n\r\n")
            return [read_answer(client).status]

        first = self.converse(conversation)
        await until(lambda: self.refreshes.asked)
        self.publish(encoded(ROWS), 18)
        self.assertEqual(await first, [200])

    async def test_bad_limits(self) -> None:
        """A value that is not a number of seconds, or is negative, or comes twice, is 400."""
        for bad in ("max_age=", "max_age", "max_age=-1", "max_age=x", "max_age=nan", "max_age=inf", "max_age=1e400",
                    "max_age=1&max_age=1", "max_age=%ff", "max_age=" + "9" * 400, "max_age=1_0"):  # fmt: skip
            for path in ("/v1/datasets/products", "/v1/datasets/products/rows/1"):
                await self.assert_problem(f"{path}?{bad}", 400, "max_age")
        for value in ("", "-1", "x", "1.5", "1e3", "%ff", "9" * 20, "1_0", "5&min_generation=6", "5&max_age=x"):
            for path in ("/v1/datasets/products", "/v1/datasets/products/rows/1"):
                name = "max_age" if value == "5&max_age=x" else "min_generation"
                await self.assert_problem(f"{path}?min_generation={value}", 400, f"{name} must be given once")


class Gzip(PortTestCase):
    def publish_many(self, generation: int, count: int = 50_000) -> None:
        self.publish(
            rows_of((b"%d" % n, b'{"id":%d,"generation":%d}' % (n, generation)) for n in range(count)), generation
        )

    async def test_made_once_for_all(self) -> None:
        """However many ask for it, at once and later, a generation is compressed once, and all get what it holds."""
        self.publish_many(18)
        plain = (await self.ask("/v1/datasets/products")).body
        for _ in range(2):
            asking = [
                Deferred.fromCoroutine(self.ask("/v1/datasets/products", Accept_Encoding="gzip")) for _ in range(8)
            ]
            for answer in await gatherResults(asking):
                self.assertEqual(answer.headers["content-encoding"], "gzip")
                self.assertEqual(gzip.decompress(answer.body), plain)
        self.assertEqual(self.factory.bodies.made, 1)
        lines = await self.ask("/v1/datasets/products", Accept_Encoding="gzip", Accept="application/x-ndjson")
        self.assertEqual(len(gzip.decompress(lines.body).splitlines()), 50_000)
        self.assertEqual(self.factory.bodies.made, 2)

    async def test_its_length_is_known_once_it_is_made(self) -> None:
        """The first response is sent while it is made; later ones have a length."""
        self.publish_many(18)
        first = await self.ask("/v1/datasets/products", Accept_Encoding="gzip")
        self.assertEqual(first.headers.get("transfer-encoding"), "chunked")
        second = await self.ask("/v1/datasets/products", Accept_Encoding="gzip")
        self.assertEqual(int(second.headers["content-length"]), len(first.body))

    async def test_freed_with_its_generation(self) -> None:
        """An old body dies at the publish, if nobody reads it; the new generation gets its own."""
        self.publish_many(18)
        await self.ask("/v1/datasets/products", Accept_Encoding="gzip")
        snapshot = self.products.snapshot
        assert snapshot is not None
        body = self.factory.bodies.find(self.products, snapshot, False)
        assert body is not None
        old = weakref.ref(body)
        rows = weakref.ref(snapshot.rows)
        del body, snapshot
        self.publish_many(19)
        await until(lambda: old() is None and rows() is None)
        answer = await self.ask("/v1/datasets/products", Accept_Encoding="gzip")
        self.assertEqual(json.loads(gzip.decompress(answer.body))["7"], {"id": 7, "generation": 19})

    async def test_a_publish_while_it_is_read(self) -> None:
        """A client that began with one generation gets all of it, even half compressed; then it is freed."""
        self.publish_many(18, 200_000)
        snapshot = self.products.snapshot
        assert snapshot is not None
        rows = weakref.ref(snapshot.rows)
        del snapshot
        asked = threading.Event()

        def conversation(client: socket.socket) -> Answer:
            client.sendall(b"GET /v1/datasets/products HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n")
            response = HTTPResponse(client)
            response.begin()
            asked.set()
            return Answer(response)

        answer = self.converse(conversation)
        await until(asked.is_set)
        self.publish_many(19, 10)
        documents = json.loads(gzip.decompress((await answer).body))
        self.assertEqual(len(documents), 200_000)
        self.assertEqual({document["generation"] for document in documents.values()}, {18})
        await until(lambda: rows() is None)

    async def test_a_large_row(self) -> None:
        """A document too large to be compressed in the reactor's thread is compressed beside it."""
        document = json.dumps({"text": [random.random() for _ in range(20_000)]})
        self.publish(encoded({"big": document}), 18)
        path = "/v1/datasets/products/rows/big"
        zipped = await self.ask(path, Accept_Encoding="gzip")
        self.assertEqual(gzip.decompress(zipped.body).decode(), document)
        plain = await self.ask(path)
        self.assertEqual((plain.body.decode(), int(plain.headers["content-length"])), (document, len(document)))


class Streaming(PortTestCase):
    async def test_one_generation_to_a_slow_reader(self) -> None:
        """While a client takes its time, generations come and others are answered; it gets all rows of the one it began
        with, and no more than a few pieces of it ever wait in memory.
        """
        count = 300_000
        filler = b"x" * 40

        def publish(generation: int, rows: int) -> None:
            self.publish(
                rows_of((b"%d" % n, b'{"g":%d,"t":"%b"}' % (generation, filler)) for n in range(rows)), generation
            )

        publish(18, count)
        first_rows = weakref.ref(self.products.snapshot.rows)  # type: ignore[union-attr]
        reading, go_on, done = threading.Event(), threading.Event(), threading.Event()

        def slow() -> bytes:
            with closing(self.connect(receive_bytes=8192)) as client:
                client.sendall(b"GET /v1/datasets/products HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                parts = [client.recv(4096)]
                reading.set()
                go_on.wait(GIVE_UP_S)
                for _ in range(50):
                    parts.append(client.recv(4096))
                    time.sleep(0.001)
                parts.append(read_to_the_end(client))
                done.set()
                return b"".join(parts)

        text = deferToThread(slow)
        await until(reading.is_set)
        (channel,) = self.factory.clients
        most_bytes = 0
        for generation in range(19, 30):
            publish(generation, 1000)
            answer = await self.ask("/v1/datasets/products/rows/7")
            self.assertEqual(answer.json()["g"], generation)
            most_bytes = max(most_bytes, buffered(channel))
        self.assertFalse(done.is_set())
        go_on.set()
        while not done.is_set():
            most_bytes = max(most_bytes, buffered(channel))
            await deferLater(reactor, 0.001)
        self.assertLessEqual(most_bytes, 4 * PIECE_BYTES)
        head, _, rest = (await text).partition(b"\r\n\r\n")
        self.assertIn(b"X-Cache-Generation: 18", head)
        documents = json.loads(unchunked(rest))
        self.assertEqual(len(documents), count)
        self.assertEqual({document["g"] for document in documents.values()}, {18})
        await until(lambda: first_rows() is None)

    async def test_http_1_0(self) -> None:
        """A client of HTTP/1.0 gets a body that ends with the connection, and needs no Host."""
        self.publish(rows_of((b"%d" % n, b"%d" % n) for n in range(100_000)), 18)
        text = await self.exchange(b"GET /v1/datasets/products HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        head, _, body = text.partition(b"\r\n\r\n")
        self.assertIn(b"Connection: close", head)
        self.assertNotIn(b"Transfer-Encoding", head)
        self.assertEqual(len(json.loads(body)), 100_000)

    async def test_half_closed(self) -> None:
        """A client that has sent all it will (printf … | nc -N) still gets all its answers, then the end."""
        self.publish(rows_of((b"%d" % n, b"%d" % n) for n in range(50_000)), 18)
        text = await self.exchange(
            b"GET /v1/datasets/products/rows/7 HTTP/1.1\r\nHost: x\r\n\r\n" * 100
            + b"GET /v1/datasets/products HTTP/1.1\r\nHost: x\r\n\r\n"
            + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
            half_close=True,
        )
        self.assertEqual(statuses(text), [200] * 102)
        self.assertTrue(text.endswith(b'{"status": "alive"}\n'))

    async def test_pipelined_in_order(self) -> None:
        """Pipelined requests of every kind are answered one after the other, in order, while others are too."""
        self.publish(rows_of((b"%d" % n, b'{"id":%d}' % n) for n in range(30_000)), 18)
        numbers = list(range(600))

        def conversation(client: socket.socket) -> list[Answer]:
            requests = []
            for number in numbers:
                path, more = f"rows/{number}", ""
                if number % 100 == 50:
                    path, more = "?", "Accept-Encoding: gzip\r\n" if number % 200 == 50 else ""
                target = f"/v1/datasets/products{'' if path == '?' else '/' + path}"
                requests.append(f"GET {target} HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode())
            sender = threading.Thread(target=client.sendall, args=(b"".join(requests),))
            sender.start()
            stream = client.makefile("rb")
            answers = []
            for _ in numbers:
                response = HTTPResponse(SocketFile(stream))  # type: ignore[arg-type]
                response.begin()
                answers.append(Answer(response))
            sender.join()
            return answers

        pipelined = self.converse(conversation)
        other = await self.ask("/livez")
        self.assertEqual(other.status, 200)
        for number, answer in zip(numbers, await pipelined, strict=True):
            if number % 100 != 50:
                self.assertEqual(answer.json(), {"id": number})
            else:
                zipped = "content-encoding" in answer.headers
                self.assertEqual(len(json.loads(gzip.decompress(answer.body) if zipped else answer.body)), 30_000)

    async def test_a_pipeline_does_not_hold_the_reactor(self) -> None:
        """Requests that came at once are answered in several turns, between which the others have theirs."""
        requests = b"GET /v1/datasets/products/rows/1 HTTP/1.1\r\nHost: x\r\n\r\n" * 5000
        with closing(self.connect()) as client:
            await until(lambda: self.factory.clients)
            (channel,) = self.factory.clients
            reading = deferToThread(lambda: len(statuses(read_to_the_end(client))))
            channel.dataReceived(requests)
            turns = 0
            while channel.phase is not Phase.READING:
                turns += 1
                await deferLater(reactor, 0)
            self.assertGreater(turns, 1)
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(await reading, 5000)

    async def test_many_at_once(self) -> None:
        """Streams to many clients take turns; each gets all of it."""
        self.publish(rows_of((b"%d" % n, b'{"id":%d}' % n) for n in range(20_000)), 18)
        for answer in await gatherResults(
            [Deferred.fromCoroutine(self.ask("/v1/datasets/products")) for _ in range(20)]
        ):
            self.assertEqual(len(answer.json()), 20_000)

    async def test_a_stream_that_breaks(self) -> None:
        """What fails in the middle of a body is logged, and the client cannot take the part for the whole."""
        self.publish(BrokenRows(), 18)  # type: ignore[arg-type]
        for headers in ({}, {"Accept_Encoding": "gzip"}):
            with self.assertRaises((OSError, HTTPException)):
                await self.ask("/v1/datasets/products", **headers)
            self.assertIn(len(self.flushLoggedErrors(ZeroDivisionError)), (1, 2))
            self.flushLoggedErrors(RuntimeError)
        self.assertEqual((await self.ask("/livez")).status, 200)


class BrokenRows:
    """Rows that cannot be read to their end."""

    count = size_bytes = 1_000_000
    digest = 0

    def slices(self, most: int) -> Iterator[tuple[list[bytes], list[bytes]]]:
        yield [b"%d" % number for number in range(most)], [bulk(b"x" * 1000)] * most
        raise ZeroDivisionError


class SocketFile:
    """What HTTPResponse wants of a socket, so that several read from one buffer."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def makefile(self, mode: str) -> Any:
        return Unclosed(self._stream)


class Unclosed:
    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        """The next answer comes from it."""


def unchunked(body: bytes) -> bytes:
    parts, position = [], 0
    while True:
        end = body.index(b"\r\n", position)
        size = int(body[position:end], 16)
        if size == 0:
            assert body[end:] == b"\r\n\r\n"
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        position = end + 4 + size


class Refusals(PortTestCase):
    async def refused(self, request: bytes) -> int:
        """What is sent is answered once, as a problem, and the connection closed behind it."""
        text = await self.exchange(request)
        head, _, body = text.partition(b"\r\n\r\n")
        self.assertEqual(len(statuses(text)), 1, text)
        self.assertIn(b"Connection: close", head)
        self.assertIn(b"Content-Type: application/problem+json", head)
        problem = json.loads(body)
        self.assertEqual(problem["status"], statuses(text)[0])
        return statuses(text)[0]

    async def test_what_rfc_9112_refuses(self) -> None:
        """Each is refused with the status the RFC names, and nothing behind it is answered."""
        get = b"GET /livez HTTP/1.1\r\n"
        for request, status in (
            (get + b"\r\n", 400),  # no Host
            (get + b"Host: a\r\nHost: a\r\n\r\n", 400),
            (get + b"Host: a b\r\n\r\n", 400),
            (get + b"Host: a/b\r\n\r\n", 400),
            (get + b"Host: a, b\r\n\r\n", 400),
            (get + b"Host: u@a\r\n\r\n", 400),
            (b"GET /livez HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
            (get + b"Host : a\r\n\r\n", 400),  # a blank before the colon
            (get + b" Host: a\r\n\r\n", 400),
            (get + b"Host: a\r\nX\r\n\r\n", 400),
            (get + b"Host: a\r\n: x\r\n\r\n", 400),
            (get + b"Host: a\r\nX: \x00\r\n\r\n", 400),
            (get + b"Host: a\r\nX: a\nY: b\r\n\r\n", 400),
            (get + b"Host: a\r\nX: a\rY: b\r\n\r\n", 400),
            (get + b"Host: a\r\nContent-Length: x\r\n\r\n", 400),
            (get + b"Host: a\r\nContent-Length: -1\r\n\r\n", 400),
            (get + b"Host: a\r\nContent-Length: +0\r\n\r\n", 400),
            (get + b"Host: a\r\nContent-Length:\r\n\r\n", 400),
            (get + b"Host: a\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n", 400),
            (get + b"Host: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (b"GET /livez HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (get + b"Host: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
            (get + b"Host: a\r\nTransfer-Encoding: identity\r\n\r\n", 501),
            (get + b"Host: a\r\nExpect: the unexpected\r\n\r\n", 417),
            (b"GET  /livez HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (b"GET /livez\r\n\r\n", 400),
            (b"GET /livez HTTP/2.0\r\nHost: a\r\n\r\n", 400),
            (b"GET /livez http/1.1\r\nHost: a\r\n\r\n", 400),
            (b"G@T /livez HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (b"GET /li\tvez HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", 400),  # TLS
            (b"\r\n\r\nGET /livez HTTP/1.1\r\nHost: a\r\n\r\n", 400),  # one empty line is passed over, not two
        ):
            self.assertEqual(await self.refused(request + b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"), status, request)

    async def test_what_rfc_9112_allows(self) -> None:
        """Odd, but right."""
        for request in (
            b"\r\nGET /livez HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nhOST:\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nHost:[::1]:8080  \r\n\r\n",
            b"GET /livez HTTP/1.1\r\nHost: a\r\nX: a,\r\n b\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nHost: a\r\nX: \xff\xfe\r\n\r\n",
        ):
            text = await self.exchange(request * 2 + b"GET /livez HTTP/1.0\r\n\r\n")
            self.assertEqual(statuses(text), [200] * 3, request)

    async def test_targets(self) -> None:
        """A target of other than printable ASCII, or with a fragment, is 400."""
        for target in (b"/livez#x", b"/v1/datasets/products/rows/\xaa", b"/\x7f", b"/livez?\xaa"):
            text = await self.exchange(b"GET %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % target)
            self.assertEqual(statuses(text), [400], target)

    async def test_long_heads(self) -> None:
        """A long target is 414, many or long headers are 431, whether they ever end or not."""
        host = b" HTTP/1.1\r\nHost: a\r\n"
        self.assertEqual(await self.refused(b"GET /" + b"x" * MAX_HEAD_BYTES + host + b"\r\n"), 414)
        self.assertEqual(await self.refused(b"GET /" + b"x" * 10 * MAX_HEAD_BYTES), 414)
        self.assertEqual(await self.refused(b"GET /" + host + b"X: " + b"x" * 10 * MAX_HEAD_BYTES), 431)
        self.assertEqual(await self.refused(b"GET /" + host + b"X: " + b"x" * (MAX_HEAD_BYTES - 10) + b"\r\n\r\n"), 431)
        self.assertEqual(await self.refused(b"GET /" + host + b"X: %b\r\n" % (b"x" * 1000) * 20 + b"\r\n"), 431)
        self.assertEqual(await self.refused(b"GET /" + host + b"X: x\r\n" * MAX_HEADERS + b"\r\n"), 431)
        long_key = b"x" * (MAX_HEAD_BYTES - 200)
        text = await self.exchange(b"GET /v1/datasets/products/rows/%b HTTP/1.0\r\n\r\n" % long_key)
        self.assertEqual(statuses(text), [404])

    async def test_a_body_is_refused_before_it_is_read(self) -> None:
        """A client with a huge body is answered at once, without 100 Continue, though it has sent nothing of it yet."""
        for head in (b"Content-Length: 10000000000", b"Transfer-Encoding: chunked"):
            for method, status in ((b"GET", 413), (b"HEAD", 413), (b"POST", 405), (b"PUT", 405)):
                text = await self.exchange(
                    b"%b /v1/datasets HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n%b\r\n\r\n" % (method, head)
                )
                self.assertEqual(statuses(text), [status])
                self.assertIn(b"Connection: close", text)
                self.assertEqual(text.partition(b"\r\n\r\n")[2] == b"", method == b"HEAD")

    async def test_a_body_that_comes_is_not_kept(self) -> None:
        """A client that sends anyway still gets the reason, and its bytes are neither kept nor taken for requests."""
        smuggled = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"

        def conversation(client: socket.socket) -> bytes:
            client.sendall(b"POST /v1/datasets HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\n")
            for _ in range(100):
                client.sendall(smuggled * 500)
            return read_to_the_end(client)

        text = self.converse(conversation)
        most_bytes = 0
        while not text.called:
            most_bytes = max([most_bytes, *map(buffered, self.factory.clients)])
            await deferLater(reactor, 0.001)
        self.assertEqual(statuses(await text), [405])
        self.assertLessEqual(most_bytes, 2 * PIECE_BYTES)

    async def test_garbage(self) -> None:
        """Whatever comes, it is answered and the connection closed, and no error is logged."""
        rng = random.Random(20260102)
        seeds = [
            b'GET /v1/datasets/products/rows/1?max_age=20 HTTP/1.1\r\nHost: a\r\nIf-None-Match: "x", W/"y"\r\n',
            b"HEAD /v1/datasets/products HTTP/1.1\r\nHost: [::1]:80\r\nAccept: a/b;q=0.1, */*\r\nConnection: close\r\n",
            b"POST /v1/datasets HTTP/1.0\r\nContent-Length: 10\r\nAccept-Encoding: gzip;q=0.5,*\r\n",
            b"GET /v1/datasets/products HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n",
            b"GET http://a/readyz HTTP/1.1\r\nHost: a\r\nIf-Modified-Since: Fri, 02 Jan 2026 03:04:05 GMT\r\n x\r\n",
        ]
        spice = [
            b"\r\n",
            b"\n",
            b"\0",
            b":",
            b" ",
            b"%",
            b"%ff",
            b'"',
            b",",
            b";",
            b"\xff",
            b"\t",
            b"HTTP/1.1",
            b"9" * 30,
        ]

        def mutated() -> bytes:
            data = bytearray(rng.choice(seeds))
            for _ in range(rng.randrange(6)):
                at = rng.randrange(len(data))
                match rng.randrange(4):
                    case 0:
                        data[at] = rng.randrange(256)
                    case 1:
                        data[at:at] = rng.choice(spice)
                    case 2:
                        del data[at : at + rng.randrange(1, 10)]
                    case 3:
                        data += data[at:]
            return bytes(data) + b"\r\n\r\n"

        inputs = [mutated() for _ in range(600)] + [
            rng.randbytes(rng.randrange(1, 3000)) + b"\r\n\r\n" for _ in range(100)
        ]

        def all_in_turn() -> list[tuple[bytes, bytes]]:
            replies = []
            for data in inputs:
                with closing(self.connect()) as client:
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)
                    replies.append((data, read_to_the_end(client)))
            return replies

        for data, text in await deferToThread(all_in_turn):
            self.assertTrue(text.startswith(b"HTTP/1.1 "), (data, text))
            self.assertNotIn(500, statuses(text), data)
        await until(lambda: not self.factory.clients)
        self.assertEqual(self.flushLoggedErrors(), [])


class SlowEnds(PortTestCase):
    async def test_the_last_reply_is_read_late(self) -> None:
        """A client that reads its last reply after the service has closed the connection still gets all of it."""
        self.patch(client_socket, "LINGER_S", 0.05)
        document = json.dumps("x" * 150_000).encode()
        self.publish(encoded({"1": document.decode()}), 18)
        client = self.connect(receive_bytes=4096)
        self.addCleanup(client.close)
        await until(lambda: self.factory.clients)
        (connection,) = self.factory.clients
        connection.transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(document))
        request = b"GET /v1/datasets/products/rows/1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        client.sendall(request)
        await until(lambda: not self.factory.clients)
        answer = await deferToThread(read_to_the_end, client)
        self.assertEqual(answer.partition(b"\r\n\r\n")[2], document)


class WrongEnds(PortTestCase):
    """Bytes that are HTTP except for a detail, so that their end would never come."""

    async def test_tls(self) -> None:
        """A TLS client is refused at once, in words that a person finds in its error or in a dump."""
        hello = bytes.fromhex("16030100c8010000c40303") + bytes(range(100))
        for data in (hello, b"\x16\x03\x03\x00\x05\n\x00\x00"):
            text = await self.exchange(data)
            self.assertEqual(statuses(text), [400])
            self.assertIn(b"this port speaks HTTP without TLS: ask for http:// here", text)

    async def test_lines_typed_by_hand(self) -> None:
        """A line that ends in LF alone is refused at once, wherever it stands in the head and however it is cut."""
        for pieces in (
            (b"GET /livez HTTP/1.1\n",),
            (b"GET /livez HTTP/1.1\nHost: a\n\n",),
            (b"GET /livez HTTP/1.1\r\nHost: a\n",),
            (b"GET /livez HTTP/1.1\r\n", b"Host: a\n"),
            (b"GET /livez HTTP/1.1", b"\n"),
            (b"\n",),
        ):

            def conversation(client: socket.socket, pieces: tuple[bytes, ...] = pieces) -> bytes:
                for piece in pieces:
                    client.sendall(piece)
                    time.sleep(0.05)
                return read_to_the_end(client)

            text = await self.converse(conversation)
            self.assertEqual(statuses(text), [400], pieces)
            self.assertIn(b"a line ends in LF alone", text)

    async def test_a_body_may_hold_what_it_likes(self) -> None:
        """LF after the head does not matter, also when CR LF CR LF is cut; nor does it after a whole request."""
        head = b"POST /v1/datasets/products HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r"
        for pieces in ((head + b"\na\nb\n",), (head, b"\na\nb\n"), (head[:-2], b"\n\r\na\nb\n")):

            def conversation(client: socket.socket, pieces: tuple[bytes, ...] = pieces) -> bytes:
                for piece in pieces:
                    client.sendall(piece)
                    time.sleep(0.05)
                return read_to_the_end(client)

            self.assertEqual(statuses(await self.converse(conversation)), [405], pieces)


class ConnectionLimit(PortTestCase):
    max_connections = 3

    async def test_one_too_many(self) -> None:
        """A connection over the limit may ask for probes; any other request gets the reply that there are too many,
        and the connection is closed. Those before it live on."""

        def conversation() -> tuple[bytes, bytes, list[Answer], Answer, list[int]]:
            clients = [self.connect() for _ in range(self.max_connections)]
            first = [ask_on(client, "/livez") for client in clients]
            with closing(self.connect()) as silent:
                unasked = read_to_the_end(silent)
            with closing(self.connect()) as eager:
                eager.sendall(b"GET /v1/datasets HTTP/1.1\r\nHost: a\r\n\r\n")
                asked = read_to_the_end(eager)
            probed = []
            for path in (b"/livez", b"/readyz", b"/metrics"):
                with closing(self.connect()) as probe:
                    probe.sendall(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path)
                    probed += statuses(read_to_the_end(probe))
            answers = [*first, *(ask_on(client, "/livez") for client in clients)]
            for client in clients:
                client.close()
            while True:
                with closing(self.connect()) as client:
                    after = ask_on(client, "/v1/datasets")
                    if after.status == 200:
                        return unasked, asked, answers, after, probed

        unasked, asked, answers, after, probed = await deferToThread(conversation)
        self.assertEqual(probed, [200, 503, 404])
        for text in (unasked, asked):
            self.assertEqual(statuses(text), [503])
            self.assertIn(b"too many connections, the limit is 3", text)
            self.assertIn(b"application/problem+json", text)
        self.assertEqual({answer.status for answer in [*answers, after]}, {200})

    async def test_a_flood(self) -> None:
        """Far over the limit, connections are closed at once: a flood costs no descriptors, and keeps no probe out."""
        clients = [self.connect() for _ in range(self.max_connections + 300)]
        try:
            self.assertEqual(statuses(await deferToThread(read_to_the_end, clients[-100])), [503])
            await until(lambda: len(self.factory.clients) <= self.max_connections + 16)
            self.assertEqual((await self.ask("/livez")).status, 200)
            self.assertGreaterEqual(self.factory.rejected["too_many_connections"], 284)
        finally:
            for client in clients:
                client.close()


class SlowHeads(PortTestCase):
    head_timeout_s = 0.3

    async def test_a_head_has_one_deadline(self) -> None:
        """A client that sends a byte now and then gets 408 and is closed, however steadily they come."""

        def conversation(client: socket.socket) -> bytes:
            client.settimeout(0.02)
            head = iter(b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 3000)
            while True:
                try:
                    client.sendall(bytes([next(head)]))
                    if text := client.recv(65_536):
                        client.settimeout(GIVE_UP_S)
                        return text + read_to_the_end(client)
                except TimeoutError:
                    continue

        text = await self.converse(conversation)
        self.assertEqual(statuses(text), [408])

    async def test_it_begins_with_the_first_byte(self) -> None:
        """Silence before a request and between two is not a slow head."""

        def conversation(client: socket.socket) -> list[int]:
            answers = []
            for _ in range(2):
                time.sleep(0.6)
                answers.append(ask_on(client, "/livez").status)
            return answers

        self.assertEqual(await self.converse(conversation), [200, 200])

    async def test_half_a_head_behind_a_request(self) -> None:
        """It counts for what follows an answer as well."""

        def conversation(client: socket.socket) -> bytes:
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\nGET /li")
            return read_to_the_end(client)

        self.assertEqual(statuses(await self.converse(conversation)), [200, 408])


class Idle(PortTestCase):
    idle_timeout_s = 0.4

    async def test_silence(self) -> None:
        """A client that sends nothing, at first or after an answer, is closed without a word."""

        def conversation(client: socket.socket) -> bytes:
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
            return read_to_the_end(client)

        self.assertEqual(await self.converse(read_to_the_end), b"")
        self.assertEqual(statuses(await self.converse(conversation)), [200])

    async def test_a_client_that_never_reads(self) -> None:
        """It is dropped, in the middle of a body as well as of a flood of requests; what waits for it stays bounded."""
        document = b'"' + b"x" * 60_000 + b'"'
        self.publish(rows_of((b"%d" % n, document) for n in range(500)), 18)
        for request in (b"GET /v1/datasets/products HTTP/1.1\r\nHost: a\r\n\r\n",
                        b"GET /v1/datasets/products/rows/1 HTTP/1.1\r\nHost: a\r\n\r\n"):  # fmt: skip
            most_bytes = 0

            def conversation(client: socket.socket) -> None:
                client.settimeout(0.01)
                try:
                    while True:
                        try:
                            client.send(request * 1000)  # noqa: B023  # awaited below
                        except TimeoutError:
                            continue
                except OSError:
                    return

            dropped = self.converse(conversation)
            while not dropped.called:
                most_bytes = max([most_bytes, *map(buffered, self.factory.clients)])
                await deferLater(reactor, 0.001)
            await dropped
            self.assertGreater(most_bytes, 0)
            self.assertLessEqual(most_bytes, 8 * PIECE_BYTES)
            await until(lambda: not self.factory.clients)


class Token(PortTestCase):
    token = "s3cret-äö"

    async def test_who_has_it_is_served(self) -> None:
        """The token opens all of /v1, under Bearer in any case; probes never need it."""
        for scheme in ("Bearer", "bearer"):
            authorization = f"{scheme} {self.token}"
            answer = await self.ask("/v1/datasets/products/rows/1", Authorization=authorization)
            self.assertEqual((answer.status, answer.body.decode()), (200, ROWS["1"]))
        self.assertEqual((await self.ask("/livez")).status, 200)
        self.assertEqual((await self.ask("/readyz")).status, 503)

    async def test_who_has_not_is_refused(self) -> None:
        """Without it all of /v1 is 401 with a challenge, and does not even reveal what exists."""
        for path in PATHS[2:9]:
            for method in ("GET", "POST"):
                answer = await self.assert_problem(path, 401, "token", method)
                self.assertEqual(answer.headers["www-authenticate"], 'Bearer realm="cacheservice"')
        for wrong in ("Bearer", "Bearer x", f"Basic {self.token}", f"Bearer {self.token}x", self.token):
            answer = await self.assert_problem("/v1/datasets", 401, "not the token", Authorization=wrong)
            self.assertIn('error="invalid_token"', answer.headers["www-authenticate"])
            self.assertNotIn(self.token.encode(), answer.body)

    async def test_guesses_from_a_shared_address(self) -> None:
        """Once the address has sent it, the right token is let in whatever others of that address guess.

        Theirs are refused at once, and so is the right token of an address that has not sent it.
        """
        guard = self.factory.guard
        assert guard is not None
        guard.passwords.throttle = throttle = Throttle(self.clock.seconds)  # it stands still
        right, path = {"Authorization": f"Bearer {self.token}"}, "/v1/datasets/products/rows/1"
        for _ in range(60):
            throttle.failed("127.0.0.1")
        await self.assert_problem(path, 429, "too many wrong tokens", **right)
        self.clock.advance(60)
        self.assertEqual((await self.ask(path, **right)).status, 200)
        for _ in range(60):
            throttle.failed("127.0.0.1")
        for _ in range(3):
            answer = await self.assert_problem(path, 429, "too many wrong tokens", Authorization="Bearer wrong")
            self.assertEqual(answer.headers["retry-after"], "2")
            self.assertEqual((await self.ask(path, **right)).status, 200)
        self.assertEqual(self.factory.rejected["auth_failed"], 4)
        self.clock.advance(3601)
        for _ in range(60):
            throttle.failed("127.0.0.1")
        await self.assert_problem(path, 429, "too many wrong tokens", **right)

    async def test_two_authorizations_are_refused(self) -> None:
        """A second Authorization header is not weighed against the first."""
        good = f"Authorization: Bearer {self.token}\r\n".encode()
        text = await self.exchange(b"GET /v1/datasets HTTP/1.1\r\nHost: a\r\n" + good + good + b"\r\n")
        self.assertEqual(statuses(text), [400])


class ProbesOnly(PortTestCase):
    allow_data = False

    async def test_only_probes(self) -> None:
        """Without a token where one is needed, /v1 is 403 and names what to set; probes are served."""
        for path in PATHS[2:9]:
            await self.assert_problem(path, 403, "set http.token")
        self.assertEqual((await self.ask("/livez")).status, 200)
        self.assertEqual((await self.ask("/readyz")).status, 503)


class Closing(PortTestCase):
    async def test_close_clients_ends_everything(self) -> None:
        """Whatever a client is in, half a head, a stream, a wait, it is closed, and nothing of it is left."""
        self.publish(rows_of((b"%d" % n, b'"%b"' % (b"x" * 1000)) for n in range(50_000)), 18)
        heads = (
            b"",
            b"GET /",
            b"GET /v1/datasets/products HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /v1/datasets/products HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\n\r\n",
            b"GET /v1/datasets/prices?max_age=1 HTTP/1.1\r\nHost: a\r\n\r\n",
        )
        clients = [self.connect() for _ in heads]
        for client, head in zip(clients, heads, strict=True):
            client.sendall(head)
        await until(lambda: len(self.factory.clients) == len(heads) and self.refreshes.asked)
        self.factory.close_clients()
        await until(lambda: not self.factory.clients)
        for client in clients:
            client.close()
        self.assertEqual(self.clock.getDelayedCalls(), [])
