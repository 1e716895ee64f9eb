"""The heads of answers: status line and header lines, made once and sent many times.

A head ends before the lines that frame its body (Content-Length, Transfer-Encoding, Connection), which the channel
adds.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from datetime import UTC, datetime
from http import HTTPStatus
from typing import NamedTuple

from twisted.web.http import datetimeToString

from cacheservice.cache.dataset import Dataset, Snapshot
from cacheservice.config import DatasetSettings


class Representation(NamedTuple):
    """One form of a dataset or a row; each has an entity tag of its own (RFC 9110, 8.8.3)."""

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
    """The head of what no cache may keep: errors, probes, live states.

    :param wall_s: seconds since the epoch.
    """
    lines = b"Date: %b\r\nContent-Type: %b\r\nCache-Control: no-store\r\n"
    return status_line(status) + lines % (datetimeToString(wall_s), content_type)


class Dates:
    """Which contents of a dataset were served under which Last-Modified, that has whole seconds."""

    _MOST = 1024

    def __init__(self) -> None:
        self._contents: OrderedDict[int, datetime | None] = OrderedDict()

    def are_of_one(self, last_modified: datetime, content_since: datetime) -> bool:
        """Note that this content is served under that date; gives whether no other one ever was."""
        second = int(last_modified.timestamp())
        before = self._contents.setdefault(second, content_since)
        if before != content_since:
            self._contents[second] = None
        if len(self._contents) > self._MOST:
            self._contents.popitem(last=False)
        return before == content_since


class SnapshotHeads:
    """The heads of all answers from one snapshot, but for their tags; true until `until_s` by the clock of `now_s`.

    ``max-age`` is the interval, and ``stale-if-error`` what is left of max_age_s after it: a cache takes Age off the
    first (RFC 9111, 4.2.3) and counts the second from its end (RFC 5861, 4), so that it keeps the answer until the
    next refresh is due, and in need until the snapshot expires.

    An answer to ``?max_age=`` may be stored for what is left of that age, as a cache that takes no Age off counts it,
    and not be used for longer, the database down or not.

    A row is sent as JSON alone, so that only the coding makes its answers differ; a dataset has two media types.

    `modified` is Last-Modified, None if another content had the same one, so that it is not to be compared.

    :param clocks: the monotonic one that the snapshot's `read_at` is of, and seconds since the epoch.
    :param asked_max_age_s: of a request that named one.
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
        # Not the snapshot itself: it would be kept from being freed.
        self.dataset = dataset
        self.generation = snapshot.generation
        self.read_at = snapshot.read_at
        age_s = max(0.0, now_s - snapshot.read_at)
        whole_age_s = math.ceil(age_s)  # what is floored would understate
        self.until_s = now_s + min(whole_age_s - age_s, 1 - wall_s % 1)
        # The database's clock may run ahead; RFC 9110, 8.8.2.1 forbids a date later than that of the answer.
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
        """Of a row as plain JSON, the way of most requests: its tag follows."""

    def found(self, representation: Representation, tag: bytes, *, whole: bool) -> bytes:
        """:param tag: with its quotes, and what makes it weak."""
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
