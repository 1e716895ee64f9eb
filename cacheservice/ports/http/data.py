"""Answers reads of data: single rows and whole datasets.

The path of a row is hot (benchmarks.http): its head is rendered with the snapshot, and its body is the document as it
is stored.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred

from cacheservice.cache.snapshot import Snapshot
from cacheservice.ports.held import Streamed
from cacheservice.ports.http import conditions
from cacheservice.ports.http.bodies import PIECE_BYTES, GzipBodies, compress_now, cut, json_lines, json_object
from cacheservice.ports.http.conditions import Validators
from cacheservice.ports.http.digests import AT_ONCE_ROWS, Digests, row_tag, whole_tag
from cacheservice.ports.http.messages import JSON_TYPE, Later, Reply, Request, is_unchanged, negotiated, wants_gzip
from cacheservice.ports.http.problem import Problem
from cacheservice.ports.http.reads import Reads, decoded
from cacheservice.ports.http.response_heads import JSON, JSON_GZIP, NDJSON, NDJSON_GZIP, SnapshotHeads

_GZIP_HERE_BYTES = 16 * 1024
"""Compressed on the reactor's thread in 0.5 ms; larger documents are compressed on another thread."""
_SHOWN_KEY_BYTES = 100


class Data:
    """Answers reads of rows and of whole datasets."""

    def __init__(self, reads: Reads, bodies: GzipBodies, digests: Digests) -> None:
        self._reads = reads
        self._bodies = bodies
        self._digests = digests

    def row(self, request: Request, name: bytes, key: bytes) -> Reply | Later:
        """Return one row; `name` and `key` are as in the path."""
        return self._reads.answer(request, name, self._row, decoded(key))

    def whole(self, request: Request, name: bytes) -> Reply | Later:
        """Return all rows of a dataset."""
        return self._reads.answer(request, name, self._whole)

    # A row

    def _row(self, request: Request, snapshot: Snapshot, ready: SnapshotHeads, key: bytes) -> Reply | Later:
        dataset, document = ready.dataset, snapshot.rows.get(key)
        if document is None:
            dataset.counts.http.miss()
            raise Problem(404, f"{dataset.name} has no row '{key[:_SHOWN_KEY_BYTES].decode(errors='replace')}'")
        dataset.counts.http.hit()
        size_bytes = len(document)
        headers = request.headers
        if b"accept" in headers:
            negotiated(request, (JSON_TYPE,))
        form = JSON_GZIP if b"accept-encoding" in headers and wants_gzip(headers, size_bytes) else JSON
        tag = row_tag(document, form)
        if not conditions.NAMES.isdisjoint(headers) and is_unchanged(headers, Validators(tag, modified=ready.modified)):
            return Reply(ready.not_modified(tag, whole=False), None)
        if form is JSON_GZIP:
            head = ready.found(form, tag, whole=False)
            if size_bytes > _GZIP_HERE_BYTES:
                return self._large_zipped_row(head, document)
            return Reply(head, compress_now(document))
        head = b"%bETag: %b\r\n" % (ready.row, tag)
        if size_bytes > PIECE_BYTES:
            return Reply(head, cut(document), size_bytes)
        return Reply(head, document)

    async def _large_zipped_row(self, head: bytes, document: bytes) -> Reply:
        body = await self._bodies.compress(document)
        return Reply(head, cut(body), len(body))

    # A whole dataset

    def _whole(self, request: Request, snapshot: Snapshot, ready: SnapshotHeads, _: bytes) -> Reply | Later:
        rows = snapshot.rows
        if rows.digest is None:
            if rows.count > AT_ONCE_ROWS or rows.size_bytes > PIECE_BYTES:
                return Deferred.fromCoroutine(self._digested(request, snapshot, ready))
            for _step in rows.digesting():
                pass
        return self._whole_tagged(request, snapshot, ready)

    async def _digested(self, request: Request, snapshot: Snapshot, ready: SnapshotHeads) -> Reply:
        await self._digests.compute(snapshot.rows)
        # The digest may take a second, and the snapshot has aged meanwhile.
        return self._whole_tagged(request, snapshot, self._reads.later_heads(ready, snapshot))

    def _whole_tagged(self, request: Request, snapshot: Snapshot, ready: SnapshotHeads) -> Reply:
        dataset, rows, headers = ready.dataset, snapshot.rows, request.headers
        dataset.counts.http.hit()
        lines = b"accept" in headers and negotiated(request, (JSON_TYPE, NDJSON.content_type)) == NDJSON.content_type
        zipped = b"accept-encoding" in headers and wants_gzip(headers, rows.size_bytes)
        form = (NDJSON_GZIP if zipped else NDJSON) if lines else (JSON_GZIP if zipped else JSON)
        tag = whole_tag(rows, form)
        if not conditions.NAMES.isdisjoint(headers) and is_unchanged(
            headers, Validators(tag, weak=True, modified=ready.modified)
        ):
            return Reply(ready.not_modified(b"W/" + tag, whole=True), None)
        head = ready.found(form, b"W/" + tag, whole=True)
        if zipped:
            if request.method == b"HEAD":  # HEAD does not justify the compression
                body = self._bodies.find(dataset, snapshot, lines)
                return Reply(head, iter(()), None if body is None else body.size_bytes)
            body = self._bodies.make(dataset, snapshot, lines)
            return Reply(head, Streamed(body.follow(), {dataset.name: snapshot}), body.size_bytes)
        pieces = json_lines(rows) if lines else json_object(rows)
        if rows.count <= AT_ONCE_ROWS and rows.size_bytes <= PIECE_BYTES:
            return Reply(head, b"".join(pieces))
        return Reply(head, Streamed(pieces, {dataset.name: snapshot}))
