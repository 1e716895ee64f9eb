"""The heads of answers: status line and header lines, made once and sent many times.

A head ends before the lines that frame its body (Content-Length, Transfer-Encoding, Connection), which the channel
adds.
"""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus
from typing import NamedTuple

from twisted.web.http import datetimeToString

from cacheservice.cache.dataset import Dataset, Snapshot


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


class SnapshotHeads:
    """The heads of all answers from one generation, true until `until_s` by the clock of `now_s`.

    ``max-age`` is the interval, and ``stale-if-error`` what is left of max_age_s after it: a cache takes Age off the
    first (RFC 9111, 4.2.3) and counts the second from its end (RFC 5861, 4), so that it keeps the answer until the
    next refresh is due, and in need until the snapshot expires.

    :param process: differs from one start of the process to the next, because a generation's number does not.
    :param now_s: the monotonic clock that the snapshot's `read_at` is of.
    :param wall_s: seconds since the epoch.
    """

    def __init__(self, dataset: Dataset, snapshot: Snapshot, process: str, now_s: float, wall_s: float) -> None:
        # Not the snapshot itself: it would be kept from being freed.
        self.dataset = dataset
        self.generation = snapshot.generation
        self.read_at = snapshot.read_at
        age_s = max(0.0, now_s - snapshot.read_at)
        self.until_s = now_s + min(1 - age_s % 1, 1 - wall_s % 1)
        # The database's clock may run ahead; RFC 9110, 8.8.2.1 forbids a date later than that of the answer.
        self.last_modified = min(snapshot.as_of, datetime.fromtimestamp(wall_s, UTC))
        settings = dataset.settings
        lifetime_s = int(settings.interval_s)
        self._tag = f"{settings.name}-{process}-{snapshot.generation}".encode()
        self._common = b"".join(
            [
                b"Date: %b\r\n" % datetimeToString(wall_s),
                b"Last-Modified: %b\r\n" % datetimeToString(self.last_modified.timestamp()),
                b"Age: %d\r\n" % age_s,
                b"Cache-Control: max-age=%d, " % lifetime_s,
                b"stale-if-error=%d\r\n" % max(0, int(settings.max_age_s) - lifetime_s),
                b"X-Cache-Generation: %d\r\n" % snapshot.generation,
                b"Vary: Accept, Accept-Encoding\r\n",
            ]
        )
        self.json = self.found(JSON)
        self.json_tag = self.tag(JSON)
        self.json_not_modified = self.not_modified(JSON)

    def tag(self, representation: Representation) -> bytes:
        return b'"%b%b"' % (self._tag, representation.tag_suffix)

    def found(self, representation: Representation) -> bytes:
        return b"%b%bETag: %b\r\nContent-Type: %b\r\n%b" % (
            status_line(200),
            self._common,
            self.tag(representation),
            representation.content_type,
            b"Content-Encoding: gzip\r\n" if representation.gzip else b"",
        )

    def not_modified(self, representation: Representation) -> bytes:
        return b"%b%bETag: %b\r\n" % (status_line(304), self._common, self.tag(representation))
