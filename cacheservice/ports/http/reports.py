"""Answers requests about datasets: list, status, reasons, last hour."""

from __future__ import annotations

from urllib.parse import quote

from cacheservice.cache.cache import Cache
from cacheservice.ports.http import response_heads
from cacheservice.ports.http.messages import JSON_TYPE, Reply, Request, WallClock, live, negotiated
from cacheservice.ports.http.reads import Reads
from cacheservice.views import collect
from cacheservice.views import json as as_json
from cacheservice.views.why import sentences

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
            described = as_json.dataset(collect.dataset(dataset))
            path = f"/v1/datasets/{quote(name)}"
            links = {"self": path, "row": path + "/rows/{key}", "status": path + "/status"}
            listed.append({"name": name} | {field: described[field] for field in _LISTED} | {"links": links})
        return live(200, {"datasets": listed}, self._wall_s(), request)

    def status(self, request: Request, name: bytes) -> Reply:
        return live(200, as_json.dataset(collect.dataset(self._reads.dataset(name))), self._wall_s(), request)

    def history(self, request: Request, name: bytes) -> Reply:
        now = self._cache.now()
        points = collect.points(self._reads.dataset(name).last_hour.points(now), now)
        return live(200, as_json.hour(points), self._wall_s(), request)

    def why(self, request: Request, name: bytes) -> Reply:
        """Return the reasons for the state as JSON, or as text with one sentence per line."""
        dataset = self._reads.dataset(name)
        chosen = negotiated(request, (JSON_TYPE, _TEXT))
        details = collect.details(dataset, self._cache)
        shown = sentences(details, collect.database(self._cache), collect.rejection(self._cache))
        if chosen == JSON_TYPE:
            return live(200, {"dataset": dataset.name, "sentences": shown}, self._wall_s())
        head = response_heads.plain_head(200, b"text/plain; charset=utf-8", self._wall_s())
        return Reply(head + b"X-Content-Type-Options: nosniff\r\n", "\n".join(shown).encode() + b"\n")
