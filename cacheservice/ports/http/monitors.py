"""Answers the probes and the requests for metrics. They need no token."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from cacheservice.cache.cache import Cache
from cacheservice.ports.http import negotiation, response_heads
from cacheservice.ports.http.bodies import PIECE_BYTES, GzipBodies, cut
from cacheservice.ports.http.messages import GZIP_FROM_BYTES, Later, Reply, Request, WallClock, live

_TEXT = b"text/plain"
_TYPES: Mapping[bytes, bytes] = MappingProxyType(
    {
        _TEXT: b"text/plain; version=0.0.4; charset=utf-8",
        b"application/openmetrics-text": b"application/openmetrics-text; version=1.0.0; charset=utf-8",
    }
)
"""The media types of the metrics, with the content type to send. The first is the default."""


class Exposition(Protocol):
    """Renders the metrics; ``cacheservice.ops.exposition.Metrics`` implements it."""

    async def exposition(self, *, openmetrics: bool) -> bytes:
        """Return all metrics in the Prometheus text format 0.0.4 or OpenMetrics 1.0.0."""


class Probes:
    """Answers /livez and /readyz."""

    def __init__(self, cache: Cache, wall_s: WallClock) -> None:
        self._cache = cache
        self._wall_s = wall_s

    def alive(self, _: Request) -> Reply:
        return live(200, {"status": "alive"}, self._wall_s())

    def ready(self, _: Request) -> Reply:
        if self._cache.is_ready:
            return live(200, {"status": "ready"}, self._wall_s())
        not_ready = {name: str(state) for name, state in self._cache.not_ready().items()}
        status = "stopping" if self._cache.stopping else "not ready"
        return live(503, {"status": status, "not_ready": not_ready}, self._wall_s())


class MetricsPage:
    """Answers /metrics."""

    def __init__(self, exposition: Exposition, bodies: GzipBodies, wall_s: WallClock) -> None:
        self._exposition = exposition
        self._bodies = bodies
        self._wall_s = wall_s

    def page(self, request: Request) -> Later:
        return self._page(request)

    async def _page(self, request: Request) -> Reply:
        # Text if the scraper accepts neither format: a 406 would leave the monitor without any metrics.
        chosen = negotiation.media_type(request.headers.get(b"accept"), tuple(_TYPES)) or _TEXT
        body = await self._exposition.exposition(openmetrics=chosen != _TEXT)
        head = response_heads.plain_head(200, _TYPES[chosen], self._wall_s()) + b"Vary: Accept, Accept-Encoding\r\n"
        if negotiation.codings(request.headers.get(b"accept-encoding")).gzip and len(body) >= GZIP_FROM_BYTES:
            head += b"Content-Encoding: gzip\r\n"
            body = await self._bodies.compress(body)
        return Reply(head, cut(body), len(body)) if len(body) > PIECE_BYTES else Reply(head, body)
