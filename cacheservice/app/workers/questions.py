"""Answers the questions of one worker, in the main process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from twisted.internet.defer import Deferred

from cacheservice.app.workers.counting import plain_totals
from cacheservice.app.workers.streams import PULLED_BYTES, Streams
from cacheservice.base.errors import CacheServiceError
from cacheservice.base.interfaces import Clock
from cacheservice.cache.cache import Cache, Refreshes
from cacheservice.ports.http.access import Rights
from cacheservice.ports.http.bodies import cut
from cacheservice.ports.http.messages import Reply
from cacheservice.ports.http.whole import Answers, Passed
from cacheservice.ports.resp.whole import Totals
from cacheservice.ports.rotation import Look
from cacheservice.replication.link import Link
from cacheservice.replication.messages import Plain
from cacheservice.views import collect
from cacheservice.views import json as as_json


class AllWorkers(Protocol):
    """The facts that only all workers together have."""

    async def totals(self) -> Totals:
        """Return those of all processes, as of now."""

    async def client_list(self) -> bytes:
        """Return the lines of CLIENT LIST, of all workers, in the order of their ids."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The parts of the main process that know the answers.

    :param look: reads the files of the clients' secrets.
    """

    cache: Cache
    refreshes: Refreshes
    answers: Answers
    look: Look
    workers: AllWorkers


class Questions:
    """Answers the calls of one worker.

    :param clock: `IReactorTime`.
    """

    def __init__(self, sources: Sources, link: Link, clock: Clock) -> None:
        self._sources = sources
        self._streams = Streams(clock)
        handlers: dict[str, Callable[..., object]] = {
            "info": self._info,
            "client_list": self._client_list,
            "dataset": self._dataset,
            "http": self._http,
            "pull": self._pull,
            "end": self._end,
            "refresh_since": self._refresh_since,
            "look": self._look,
        }
        for name, handler in handlers.items():
            link.handle(name, cast("Callable[..., Plain]", handler))

    def stop(self) -> None:
        """End the replies in progress, because the worker has gone."""
        self._streams.end_all()

    async def _info(self) -> Plain:
        cache = self._sources.cache
        totals = await self._sources.workers.totals()
        return {"pid": os.getpid(), "uptime_s": cache.now() - cache.started_at, "totals": plain_totals(totals)}

    async def _client_list(self) -> Plain:
        return await self._sources.workers.client_list()

    def _dataset(self, dataset: str) -> Plain:
        found = self._sources.cache.datasets.get(dataset)
        return None if found is None else cast("Plain", as_json.dataset(collect.dataset(found)))

    async def _http(
        self, method: bytes, target: bytes, headers: Sequence[tuple[bytes, bytes]], peer: str, rights: Rights
    ) -> Plain:
        request = Passed(method, target, dict(headers), peer, rights)
        return self._plain(await self._sources.answers.answer(request), has_body=method != b"HEAD")

    def _plain(self, reply: Reply, *, has_body: bool) -> Plain:
        head, body, size_bytes, endless = reply
        stream = None
        if isinstance(body, bytes):
            size_bytes = len(body)
            if size_bytes > PULLED_BYTES:
                body = cut(body)
        if isinstance(body, bytes):
            body = body if has_body else None
        elif body is not None:
            stream = self._streams.begin(body) if has_body else None
            body = None
        return {
            "head": head,
            "body": body,
            "size_bytes": size_bytes,
            "endless": endless,
            "stream": stream,
            "is_bodiless": reply.body is None,
        }

    def _pull(self, stream: int) -> Plain | Deferred[Plain]:
        return cast("Plain | Deferred[Plain]", self._streams.pull(stream))

    def _end(self, stream: int) -> None:
        self._streams.end(stream)

    def _refresh_since(self, dataset: str, moment: float) -> None:
        try:
            self._sources.refreshes.refresh_since(dataset, moment)
        except CacheServiceError:
            return  # the dataset was removed, or the service is stopping; the client waits until its time is up

    async def _look(self) -> Plain:
        looking: Deferred[None] | None = self._sources.look()
        if looking is not None:
            await looking
        return None
