"""The heads of responses, rendered once and sent many times.

A head has the status line and the header lines, except those that frame its body (Content-Length, Transfer-Encoding,
Connection): `exchange` adds these.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from datetime import UTC, datetime
from http import HTTPStatus
from typing import NamedTuple

from twisted.web.http import datetimeToString

from cacheservice.cache.dataset import Dataset
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings


class Representation(NamedTuple):
    """One form of a dataset or a row.

    Each form has its own entity tag (RFC 9110, 8.8.3).
    """

    content_type: bytes
    tag_suffix: bytes
    gzip: bool


JSON = Representation(b"application/json", b"", gzip=False)
JSON_GZIP = Representation(b"application/json", b"-gzip", gzip=True)
NDJSON = Representation(b"application/x-ndjson", b"-ndjson", gzip=False)
NDJSON_GZIP = Representation(b"application/x-ndjson", b"-ndjson-gzip", gzip=True)


def status_line(status: int) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (status, HTTPStatus(status).phrase.encode())


def plain_head(status: int, content_type: bytes, wall_s: float) -> bytes:
    """Return the head of responses that caches must not store.

    These are errors, probes and live states.

    :param wall_s: seconds since the epoch.
    """
    lines = b"Date: %b\r\nContent-Type: %b\r\nCache-Control: no-store\r\n"
    return status_line(status) + lines % (datetimeToString(wall_s), content_type)


class Dates:
    """The contents of a dataset by Last-Modified, which has whole seconds."""

    _MOST = 1024

    def __init__(self) -> None:
        self._contents: OrderedDict[int, datetime | None] = OrderedDict()

    def are_of_one(self, last_modified: datetime, content_since: datetime) -> bool:
        """Record that this content is served with that date.

        Return True if no other content has had the same date.
        """
        second = int(last_modified.timestamp())
        before = self._contents.setdefault(second, content_since)
        if before != content_since:
            self._contents[second] = None
        if len(self._contents) > self._MOST:
            self._contents.popitem(last=False)
        return before == content_since


class SnapshotHeads:
    """The heads of all responses from one snapshot, without their tags.

    They are valid until `until_s` on the clock of `now_s`. ``max-age`` is the interval, and ``stale-if-error`` is the
    rest of max_age_s after it. A cache subtracts Age from the first (RFC 9111, 4.2.3) and counts the second from the
    end of the first (RFC 5861, 4). So it reuses the response until the next refresh is due, and in case of errors until
    the snapshot expires.

    A response to ``?max_age=`` may be stored for the rest of that age, as counted by a cache that does not subtract
    Age. It must not be reused for longer, whether or not the database is down.

    A row is available as JSON only, so its responses differ only in coding. A dataset has two media types.

    `modified` is Last-Modified, or None if another content had the same date, so that it must not be compared.

    :param clocks: the monotonic clock of the snapshot's `read_at`, and seconds since the epoch.
    :param asked_max_age_s: the `max_age` of the request, if it has one.
    """

    def __init__(
        self,
        dataset: Dataset,
        snapshot: Snapshot,
        dates: Dates,
        clocks: tuple[float, float],
        asked_max_age_s: float | None = None,
    ) -> None:
        now_s, wall_s = clocks
        self.asked_max_age_s = asked_max_age_s
        # Not the snapshot: the reference would keep it in memory.
        self.dataset = dataset
        self.generation = snapshot.generation
        self.read_at = snapshot.read_at
        age_s = max(0.0, now_s - snapshot.read_at)
        whole_age_s = math.ceil(age_s)  # the floor would understate the age
        self.until_s = now_s + min(whole_age_s - age_s, 1 - wall_s % 1)
        # The clock of the database may be ahead. RFC 9110, 8.8.2.1 forbids a date later than that of the response.
        last_modified = min(snapshot.modified_as_of, datetime.fromtimestamp(wall_s, UTC))
        self.modified = last_modified if dates.are_of_one(last_modified, snapshot.modified_as_of) else None
        common = b"".join(
            [
                b"Date: %b\r\n" % datetimeToString(wall_s),
                b"Last-Modified: %b\r\n" % datetimeToString(last_modified.timestamp()),
                b"Age: %d\r\n" % whole_age_s,
                b"Cache-Control: %b\r\n" % _cache_control(dataset.settings, age_s, asked_max_age_s),
                b"X-Cache-Generation: %d\r\n" % snapshot.generation,
            ]
        )
        self._of_row = common + b"Vary: Accept-Encoding\r\n"
        self._of_whole = common + b"Vary: Accept, Accept-Encoding\r\n"
        self.row = status_line(200) + self._of_row + b"Content-Type: application/json\r\n"
        """The head of a row as plain JSON, which most requests use; its tag follows."""

    def found(self, representation: Representation, tag: bytes, *, whole: bool) -> bytes:
        """Return the head of a 200 response.

        :param tag: with its quotes, and with ``W/`` if it is weak.
        """
        return b"%b%bETag: %b\r\nContent-Type: %b\r\n%b" % (
            status_line(200),
            self._of_whole if whole else self._of_row,
            tag,
            representation.content_type,
            b"Content-Encoding: gzip\r\n" if representation.gzip else b"",
        )

    def not_modified(self, tag: bytes, *, whole: bool) -> bytes:
        return b"%b%bETag: %b\r\n" % (status_line(304), self._of_whole if whole else self._of_row, tag)


def _cache_control(settings: DatasetSettings, age_s: float, asked_max_age_s: float | None) -> bytes:
    lifetime_s = int(settings.interval_s)
    if asked_max_age_s is None:
        return b"max-age=%d, stale-if-error=%d" % (lifetime_s, max(0, int(settings.max_age_s) - lifetime_s))
    return b"max-age=%d, must-revalidate" % min(lifetime_s, max(0, int(asked_max_age_s - age_s)))
