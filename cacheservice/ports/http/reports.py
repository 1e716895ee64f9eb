"""Answers requests about datasets: list, status, reasons, last hour."""

from __future__ import annotations

from urllib.parse import quote

from cacheservice.cache.cache import Cache
from cacheservice.cache.describe import describe_dataset, describe_hour
from cacheservice.ports import report
from cacheservice.ports.http import heads
from cacheservice.ports.http.messages import JSON_TYPE, Reply, Request, WallClock, live, negotiated
from cacheservice.ports.http.reads import Reads

_TEXT = b"text/plain"
_LISTED = ("state", "rows", "bytes", "generation", "as_of", "age_s")


class Reports:
    """Answers requests about datasets; `name` is as in the path.

    :param wall_s: returns seconds since the epoch, for dates.
    """

    def __init__(self, cache: Cache, reads: Reads, wall_s: WallClock) -> None:
        self._cache = cache
        self._reads = reads
        self._wall_s = wall_s

    def all_datasets(self, request: Request) -> Reply:
        listed = []
        for name, dataset in self._cache.datasets.items():
            described = describe_dataset(dataset)
            path = f"/v1/datasets/{quote(name)}"
            links = {"self": path, "row": path + "/rows/{key}", "status": path + "/status"}
            listed.append({"name": name} | {field: described[field] for field in _LISTED} | {"links": links})
        return live(200, {"datasets": listed}, self._wall_s(), request)

    def status(self, request: Request, name: bytes) -> Reply:
        return live(200, describe_dataset(self._reads.dataset(name)), self._wall_s(), request)

    def history(self, request: Request, name: bytes) -> Reply:
        now = self._cache.now()
        hour = self._reads.dataset(name).last_hour
        return live(200, describe_hour(hour.points(now), now), self._wall_s(), request)

    def why(self, request: Request, name: bytes) -> Reply:
        """Return the reasons for the state as JSON, or as text with one sentence per line."""
        dataset = self._reads.dataset(name)
        chosen = negotiated(request, (JSON_TYPE, _TEXT))
        words = report.why(dataset, self._cache)
        if chosen == JSON_TYPE:
            return live(200, {"dataset": dataset.name, "sentences": words.split("\n")}, self._wall_s())
        head = heads.plain_head(200, b"text/plain; charset=utf-8", self._wall_s())
        return Reply(head + b"X-Content-Type-Options: nosniff\r\n", words.encode() + b"\n")
