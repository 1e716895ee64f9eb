"""Finds the snapshot that answers a read, or the reason why there is none.

A request names a dataset, and may ask for a greatest age or a least generation. The answer comes from a snapshot with
the heads that were rendered for it.
"""

from __future__ import annotations

import math
import re
from typing import Protocol
from urllib.parse import unquote_to_bytes

from cacheservice.base.errors import Stopped, UnknownDataset
from cacheservice.cache import reading
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.events import Added, Changed, Ended
from cacheservice.cache.reading import NotLoaded, NotReached, Refused, TooOld
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ports.freshness import Freshness, Wanted
from cacheservice.ports.http import parameters
from cacheservice.ports.http.messages import Later, Reply, Request, WallClock, query_of
from cacheservice.ports.http.problem import Problem
from cacheservice.ports.http.response_heads import Dates, SnapshotHeads

_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class Answer(Protocol):
    """Renders the reply to a read from a snapshot."""

    def __call__(self, request: Request, snapshot: Snapshot, ready: SnapshotHeads, key: bytes, /) -> Reply | Later: ...


class Reads:
    """Answers reads of datasets from their snapshots.

    The heads of a snapshot are rendered once, until its age or the date changes by a second.

    :param wall_s: returns seconds since the epoch, for dates.
    """

    def __init__(self, cache: Cache, freshness: Freshness, wall_s: WallClock) -> None:
        self._cache = cache
        self._freshness = freshness
        self._wall_s = wall_s
        self._heads: dict[str, SnapshotHeads] = {}
        self._dates: dict[str, Dates] = {}
        cache.events.subscribe(lambda event: self._heads.pop(event.dataset, None), Added, Changed, Ended)

    def answer(self, request: Request, name: bytes, answer: Answer, key: bytes = b"") -> Reply | Later:
        """Return the reply of `answer` to a read, which may wait for a refresh or a generation.

        :param name: as in the path.
        :raises Problem: if the dataset is unknown or may not be served now, or for invalid parameters.
        """
        dataset = self.dataset(name)
        if b"?" in request.target:
            wanted = parameters.wanted(query_of(request))
            if wanted is not None:
                return self._when_met(dataset, wanted, request, answer, key)
        snapshot = served(dataset)
        return answer(request, snapshot, self._heads_of(dataset, snapshot), key)

    def dataset(self, encoded: bytes) -> Dataset:
        """Return a dataset by its name in the path.

        :raises Problem: 404 for an unknown name, 400 for one that cannot be decoded.
        """
        name = decoded(encoded).decode()
        try:
            return self._cache.dataset(name)
        except UnknownDataset as error:
            raise (_unknown(error) if name else _nameless()) from None

    def later_heads(self, ready: SnapshotHeads, snapshot: Snapshot) -> SnapshotHeads:
        """Return the heads of a snapshot as of now, for a reply that took a while."""
        return self._new_heads(ready.dataset, snapshot, ready.asked_max_age_s)

    async def _when_met(self, dataset: Dataset, wanted: Wanted, request: Request, answer: Answer, key: bytes) -> Reply:
        try:
            is_met = await self._freshness.meets(dataset, wanted)
        except UnknownDataset as error:
            raise _unknown(error) from None
        except Stopped as error:
            raise Problem(503, str(error), b"Retry-After: 1\r\n") from None
        if not is_met:
            raise _not_served(_unmet(dataset, wanted), dataset)
        snapshot = served(dataset)
        if math.isinf(wanted.max_age_s):
            reply = answer(request, snapshot, self._heads_of(dataset, snapshot), key)
        else:
            reply = answer(request, snapshot, self._new_heads(dataset, snapshot, wanted.max_age_s), key)
        return reply if isinstance(reply, Reply) else await reply

    def _heads_of(self, dataset: Dataset, snapshot: Snapshot) -> SnapshotHeads:
        ready = self._heads.get(dataset.name)
        now_s = self._cache.now()
        if (
            ready is None
            or ready.generation != snapshot.generation
            or ready.read_at != snapshot.read_at
            or now_s >= ready.until_s
        ):
            ready = self._heads[dataset.name] = self._new_heads(dataset, snapshot)
        return ready

    def _new_heads(self, dataset: Dataset, snapshot: Snapshot, max_age_s: float | None = None) -> SnapshotHeads:
        dates = self._dates.setdefault(dataset.name, Dates())
        return SnapshotHeads(dataset, snapshot, dates, (self._cache.now(), self._wall_s()), max_age_s)


def decoded(part: bytes) -> bytes:
    """Decode a part of a path.

    :raises Problem: 400 for an invalid escape, and for bytes that are not UTF-8.
    """
    if b"%" not in part:
        return part
    if _BAD_ESCAPE.search(part):
        raise Problem(400, "the path holds a % that two hexadecimal digits do not follow; a % itself is %25")
    plain = unquote_to_bytes(part)
    try:
        plain.decode()
    except UnicodeDecodeError:
        raise Problem(400, "the path, once decoded, is not UTF-8") from None
    return plain


def served(dataset: Dataset) -> Snapshot:
    """Return the served snapshot.

    :raises Problem: 503 if no snapshot is loaded, or if it is expired and `on_expired` is "refuse".
    """
    try:
        return reading.served(dataset, dataset.counts.http)
    except (NotLoaded, TooOld) as refused:
        raise _not_served(refused, dataset) from None


def _unmet(dataset: Dataset, wanted: Wanted) -> Refused:
    """Return the refusal of a reader that waited in vain: for the generation, or else for the age."""
    if dataset.snapshot is None or dataset.snapshot.generation < wanted.min_generation:
        return reading.not_reached(dataset, wanted.min_generation, dataset.counts.http)
    return reading.not_fresh(dataset, wanted.max_age_s, dataset.counts.http)


def _not_served(refused: Refused, dataset: Dataset) -> Problem:
    retry_after = b"Retry-After: %d\r\n" % max(1, math.ceil(dataset.next_refresh_in_s() or 0.0))
    if isinstance(refused, NotLoaded):
        return Problem(503, str(refused), retry_after)
    if isinstance(refused, NotReached):
        members = {"generation": refused.generation, "min_generation": refused.wanted}
        return Problem(503, str(refused), retry_after, members)
    return Problem(503, str(refused), retry_after, {"age_s": round(refused.age_s, 3), "max_age_s": refused.limit_s})


def _nameless() -> Problem:
    return Problem(
        404, "there is nothing at /v1/datasets/ without a name; GET /v1/datasets, without the slash, lists the datasets"
    )


def _unknown(error: UnknownDataset) -> Problem:
    return Problem(404, f"{error}; GET /v1/datasets lists them")
