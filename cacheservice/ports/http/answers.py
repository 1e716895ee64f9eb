"""The routes of /v1, the dashboard and the probes.

They are functions of the cache and of the head of a request.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote_to_bytes

from twisted.internet.defer import Deferred

from cacheservice.base.errors import Stopped, UnknownDataset
from cacheservice.cache.cache import Cache, Refreshes
from cacheservice.cache.dataset import Dataset, Snapshot, State
from cacheservice.cache.events import Added, Changed, Ended
from cacheservice.ports.freshness import Freshness
from cacheservice.ports.held import Streamed
from cacheservice.ports.http import assets, commands, conditions, heads, negotiation, parameters
from cacheservice.ports.http.bodies import PIECE_BYTES, GzipBodies, Piece, compress_now, cut, json_lines, json_object
from cacheservice.ports.http.conditions import Validators
from cacheservice.ports.http.digests import AT_ONCE_ROWS, Digests, row_tag, whole_tag
from cacheservice.ports.http.events import Feed
from cacheservice.ports.http.guard import CHALLENGE, Guard
from cacheservice.ports.http.heads import JSON, JSON_GZIP, NDJSON, NDJSON_GZIP, Dates, SnapshotHeads
from cacheservice.ports.http.problem import Problem
from cacheservice.views import collect, explain
from cacheservice.views import json as as_json

_JSON = b"application/json"
_METRICS_TEXT = b"text/plain"
_METRICS_TYPES: Mapping[bytes, bytes] = MappingProxyType(
    {
        _METRICS_TEXT: b"text/plain; version=0.0.4; charset=utf-8",
        b"application/openmetrics-text": b"application/openmetrics-text; version=1.0.0; charset=utf-8",
    }
)
"""The media types of the metrics, with the content type to send. The first is the default."""
_DATASETS = b"/v1/datasets"
_DATASET = b"/v1/datasets/"
_ROW = b"rows/"
_ASSETS = b"/assets/"
_PROBES = frozenset({b"/livez", b"/readyz", b"/metrics"})
"""The paths of monitors. They need no token, and are served over the limit of connections."""
_READ_METHODS = (b"GET", b"HEAD")
_ADMIN_TOKEN = "http.admin_token"  # noqa: S105  # the name of the setting
_HTML, _PROBLEM, _EVENTS, _TEXT = b"text/html", b"application/problem+json", b"text/event-stream", b"text/plain"

_GZIP_FROM_BYTES = 1024
"""Below this size, gzip's header and the client's work cost more than compression saves."""
_GZIP_HERE_BYTES = 16 * 1024
"""Compressed on the reactor's thread in 0.5 ms; larger documents are compressed on another thread."""
_AT_ONCE_ROWS = 512
_SHOWN_KEY_BYTES = 100

_TARGET = re.compile(rb"[!-\"$-~]+")
_ORIGIN = re.compile(rb"https?://[^/?]+", re.IGNORECASE)
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class Reply(NamedTuple):
    """A response without the lines that frame its body.

    `body` is bytes, or pieces of `size_bytes` in total if that is known; None for a 304, which has no body. An
    `endless` body ends with the connection.
    """

    head: bytes
    body: bytes | Iterator[Piece] | None
    size_bytes: int | None = None
    endless: bool = False


Later = Coroutine[Any, Any, Reply] | Deferred[Reply]


class Request:
    """The head of a request.

    `target` is as received; `headers` are by their names in lower case.
    """

    __slots__ = ("headers", "method", "target")

    def __init__(self, method: bytes, target: bytes, headers: dict[bytes, bytes]) -> None:
        self.method = method
        self.target = target
        self.headers = headers

    def host(self) -> str:
        """Return the address of the client."""
        return ""


class Exposition(Protocol):
    """Renders the metrics; ``cacheservice.ops.metrics.Metrics`` implements it."""

    async def exposition(self, *, openmetrics: bool) -> bytes:
        """Return all metrics in the Prometheus text format 0.0.4 or OpenMetrics 1.0.0."""


class Answers:
    """Answers requests.

    :param refreshes: the target of commands.
    :param guard: None if no token is configured.
    :param allow_data: False serves only the probes and metrics if there is no token.
    :param files: the files of the dashboard.
    :param exposition: None for no page of metrics.
    :param wall_s: returns seconds since the epoch, for dates.
    """

    def __init__(
        self,
        cache: Cache,
        freshness: Freshness,
        refreshes: Refreshes,
        bodies: GzipBodies,
        digests: Digests,
        feed: Feed,
        guard: Guard | None,
        allow_data: bool,
        files: Mapping[bytes, assets.Asset],
        exposition: Exposition | None = None,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._cache = cache
        self._freshness = freshness
        self._refreshes = refreshes
        self._feed = feed
        self._files = files
        self._bodies = bodies
        self._digests = digests
        self._guard = guard
        self._reads_freely = allow_data and (guard is None or not guard.is_for_reading)
        self._exposition = exposition
        self._wall_s = wall_s
        self._heads: dict[str, SnapshotHeads] = {}
        self._dates: dict[str, Dates] = {}
        cache.events.subscribe(lambda event: self._heads.pop(event.dataset, None), Added, Changed, Ended)

    def answer(self, request: Request) -> Reply | Later:
        """Return the response to a request, now or later.

        A Deferred fires without further events; a coroutine waits for an event, such as a refresh.

        :raises Problem: if the request cannot be fulfilled; the coroutine raises it too.
        """
        path = request.target.partition(b"?")[0]
        if path[:1] != b"/":
            path = _path_of_absolute(path)
        if not path.isascii() or not _TARGET.fullmatch(request.target):
            raise Problem(400, "the request's target may hold printable ASCII only; encode the rest as %XX")
        if request.method == b"POST" and path[:13] == _DATASET:
            commanded = self._command(request, path[13:])
            if commanded is not None:
                return commanded
        if path[:4] == b"/v1/":
            refused = self._refused(request)
            if refused is not None:
                return refused
        if path[:13] == _DATASET:
            name, slash, rest = path[13:].partition(b"/")
            if rest[:5] == _ROW:
                return self._of_dataset(request, name, self._row, decoded(rest[5:]))
            if not slash:
                return self._of_dataset(request, name, self._whole)
            return self._about(request, name, rest)
        if path == _DATASETS:
            _check(request)
            return self._live(200, self._list(), request)
        return self._for_monitors(request, path) or self._dashboard(request, path)

    def problem(self, problem: Problem, target: bytes) -> tuple[bytes, bytes]:
        """Return the head and the body of an error response."""
        head = heads.plain_head(problem.status, b"application/problem+json", self._wall_s())
        return head + problem.headers, problem.body(target)

    # Access

    def _refused(self, request: Request) -> Coroutine[Any, Any, Reply] | None:
        """Return None if the client may read data; otherwise return or raise the refusal."""
        if self._reads_freely:
            return None
        guard, authorization = self._required_guard(), request.headers.get(b"authorization")
        if authorization is None:
            guard.refuse_missing()
        host = request.host()
        guard.admit(host, authorization)
        if guard.accepts(host, authorization):
            return None
        return self._refuse_wrong(request, lambda: guard.accepts(host, authorization))

    async def _refuse_wrong(self, request: Request, is_right: Callable[[], bool], setting: str = "http.token") -> Reply:
        """Refuse a wrong token, or answer the request if the token has become correct."""
        await self._required_guard().refuse_wrong(request.host(), is_right, setting)
        answer = self.answer(request)
        return answer if isinstance(answer, Reply) else await answer

    def _required_guard(self) -> Guard:
        """Return the guard.

        :raises Problem: 403 without a guard: no client may read data.
        """
        if self._guard is None:
            raise Problem(
                403, "this port serves data beyond its own machine only with a token; set http.token and send it"
            )
        return self._guard

    def _command(self, request: Request, rest: bytes) -> Reply | Later | None:
        """Run a command of the admin socket.

        Return None for other paths, or if no token for commands is configured. Browsers never send the Authorization
        header that it needs on behalf of another site.
        """
        guard, (name, _, command) = self._guard, rest.partition(b"/")
        if guard is None or not guard.is_for_commands or command not in commands.COMMANDS:
            return None
        authorization, host = request.headers.get(b"authorization"), request.host()
        if authorization is None:
            guard.refuse_missing(_ADMIN_TOKEN)
        guard.admit(host, authorization)
        if not guard.accepts_commands(host, authorization):
            if guard.accepts(host, authorization):
                raise Problem(403, f"this token may only read; send that of {_ADMIN_TOKEN}")
            return self._refuse_wrong(request, lambda: guard.accepts_commands(host, authorization), _ADMIN_TOKEN)
        if b"transfer-encoding" in request.headers or request.headers.get(b"content-length", b"0").strip(b"0"):
            raise Problem(413, "a command takes no request body")
        parameters.check(_query(request))
        dataset = self._dataset(name)
        if b"if-match" in request.headers:
            # If-Match refers to a representation of the target, and a command has none (RFC 9110, 13.1.1).
            raise conditions.precondition_failed()
        return self._live(*commands.run(command, self._refreshes, dataset.name), request)

    # Reports about a dataset

    def _about(self, request: Request, name: bytes, what: bytes) -> Reply:
        if what == b"status":
            _check(request)
            return self._live(200, as_json.dataset(collect.dataset(self._dataset(name))), request)
        if what == b"why":
            _check(request)
            return self._why(self._dataset(name), request)
        if what == b"history":
            _check(request)
            now = self._cache.now()
            points = collect.points(self._dataset(name).last_hour.points(now), now)
            return self._live(200, as_json.hour(points), request)
        if what in commands.COMMANDS:
            if self._guard is not None and self._guard.is_for_commands:
                raise Problem(405, "commands are sent with POST", b"Allow: POST\r\n")
            _check(request)
        raise _nothing_here() if what else _slash_at_the_end()

    def _why(self, dataset: Dataset, request: Request) -> Reply:
        chosen = _negotiated(request, (_JSON, _TEXT))
        details = collect.details(dataset, self._cache)
        sentences = explain.why(details, collect.database(self._cache), collect.rejection(self._cache))
        if chosen == _JSON:
            return self._live(200, {"dataset": dataset.name, "sentences": sentences})
        head = heads.plain_head(200, b"text/plain; charset=utf-8", self._wall_s())
        return Reply(head + b"X-Content-Type-Options: nosniff\r\n", "\n".join(sentences).encode() + b"\n")

    # The dashboard

    def _dashboard(self, request: Request, path: bytes) -> Reply | Later:
        if path == b"/":
            return self._page(request)
        if path == b"/events":
            return self._events(request)
        if path[:8] == _ASSETS:
            return self._asset(request, path[8:])
        raise _nothing_here()

    def _page(self, request: Request) -> Reply | Later:
        """Serve the page, which contains no secret.

        If the request has no token, the status is 401 and the page prompts for the token.
        """
        _check(request)
        page = self._files[assets.PAGE]
        if not self._reads_freely and b"authorization" not in request.headers:
            self._required_guard()
            accept = request.headers.get(b"accept")
            if negotiation.media_type(accept, (_PROBLEM, _HTML)) == _HTML:
                return Reply(page.head(401, self._wall_s()) + CHALLENGE, page.plain)
        return self._refused(request) or self._file(request, page)

    def _asset(self, request: Request, name: bytes) -> Reply:
        """Serve an asset; assets are public and need no token."""
        _check(request)
        if not self._reads_freely:
            self._required_guard()
        file = self._files.get(name)
        if file is None:
            raise Problem(404, "there is no such file of the dashboard")
        return self._file(request, file)

    def _file(self, request: Request, file: assets.Asset) -> Reply:
        headers = request.headers
        zipped = b"accept-encoding" in headers and _zipped(headers, len(file.plain))
        if _is_unchanged(headers, Validators(file.entity_tag(zipped))):
            return Reply(file.head(304, self._wall_s(), zipped), None)
        return Reply(file.head(200, self._wall_s(), zipped), file.zipped if zipped else file.plain)

    def _events(self, request: Request) -> Reply | Later:
        _check(request)
        refused = self._refused(request)
        if refused is not None:
            return refused
        guard, authorization = self._guard, request.headers.get(b"authorization")
        access = "read"
        if guard is not None and authorization is not None:
            # The client sent a token although none is needed, to check whether it is correct.
            host = request.host()
            guard.admit(host, authorization)
            if not guard.accepts(host, authorization):
                return self._refuse_wrong(request, lambda: guard.accepts(host, authorization), _ADMIN_TOKEN)
            access = "admin" if guard.accepts_commands(host, authorization) else "read"
        _negotiated(request, (_EVENTS,))
        head = heads.plain_head(200, _EVENTS, self._wall_s())
        # nginx would hold back the events until its buffer is full.
        head += (
            b"X-Content-Type-Options: nosniff\r\nCross-Origin-Resource-Policy: same-origin\r\nX-Accel-Buffering: no\r\n"
        )
        return Reply(head, self._feed.follow(access, guard is not None and guard.is_for_commands), endless=True)

    # Live states, which caches must not store

    def _live(self, status: int, value: object, request: Request | None = None) -> Reply:
        """Return a live state as JSON.

        :param request: to negotiate with; None for a probe, which always gets JSON.
        """
        if request is not None:
            _negotiated(request, (_JSON,))
            if status == 200 and request.method in _READ_METHODS and _is_unchanged(request.headers, Validators()):
                return Reply(heads.plain_head(304, _JSON, self._wall_s()), None)
        return Reply(heads.plain_head(status, _JSON, self._wall_s()), json.dumps(value).encode() + b"\n")

    def _for_monitors(self, request: Request, path: bytes) -> Reply | Later | None:
        """Serve the probes and the metrics, which need no token; None for other paths."""
        if path not in _PROBES:
            return None
        _check(request)
        if path == b"/livez":
            return self._live(200, {"status": "alive"})
        if path == b"/readyz":
            return self._ready()
        return None if self._exposition is None else self._metrics(request, self._exposition)

    def _ready(self) -> Reply:
        if self._cache.is_ready:
            return self._live(200, {"status": "ready"})
        not_ready = {name: str(state) for name, state in self._cache.not_ready().items()}
        status = "stopping" if self._cache.stopping else "not ready"
        return self._live(503, {"status": status, "not_ready": not_ready})

    async def _metrics(self, request: Request, exposition: Exposition) -> Reply:
        """Serve the metrics in a format that the scraper accepts, or as text.

        A 406 would leave the monitor without any metrics.
        """
        chosen = negotiation.media_type(request.headers.get(b"accept"), tuple(_METRICS_TYPES)) or _METRICS_TEXT
        body = await exposition.exposition(openmetrics=chosen != _METRICS_TEXT)
        head = heads.plain_head(200, _METRICS_TYPES[chosen], self._wall_s()) + b"Vary: Accept, Accept-Encoding\r\n"
        if negotiation.codings(request.headers.get(b"accept-encoding")).gzip and len(body) >= _GZIP_FROM_BYTES:
            head += b"Content-Encoding: gzip\r\n"
            body = await self._bodies.compress(body)
        return Reply(head, cut(body), len(body)) if len(body) > PIECE_BYTES else Reply(head, body)

    def _list(self) -> dict[str, Any]:
        fields = ("state", "rows", "bytes", "generation", "as_of", "age_s")
        listed = []
        for name, dataset in self._cache.datasets.items():
            described = as_json.dataset(collect.dataset(dataset))
            path = f"/v1/datasets/{quote(name)}"
            links = {"self": path, "row": path + "/rows/{key}", "status": path + "/status"}
            listed.append({"name": name} | {field: described[field] for field in fields} | {"links": links})
        return {"datasets": listed}

    # Data

    def _of_dataset(self, request: Request, name: bytes, then: Callable[..., Any], *arguments: bytes) -> Reply | Later:
        _check_method(request)
        dataset = self._dataset(name)
        if b"?" in request.target:
            max_age_s = parameters.max_age_s(_query(request))
            if max_age_s is not None:
                return self._when_fresh(dataset, max_age_s, request, then, arguments)
        snapshot = _served(dataset)
        return then(request, snapshot, self._heads_of(dataset, snapshot), *arguments)  # type: ignore[no-any-return]

    async def _when_fresh(
        self,
        dataset: Dataset,
        max_age_s: float,
        request: Request,
        then: Callable[..., Any],
        arguments: tuple[bytes, ...],
    ) -> Reply:
        try:
            fresh = await self._freshness.at_most(dataset, max_age_s)
        except UnknownDataset as error:
            raise _unknown(error) from None
        except Stopped as error:
            raise Problem(503, str(error), b"Retry-After: 1\r\n") from None
        if not fresh:
            age_s = dataset.age_s()
            if age_s is not None:
                dataset.counts.http.stale += 1
            if age_s is None:
                raise _not_loaded(dataset)
            raise Problem(
                503,
                f"{dataset.name} is {age_s:.1f} s old, asked for was at most {max_age_s:g} s",
                _retry_after(dataset),
                {"age_s": round(age_s, 3), "max_age_s": max_age_s},
            )
        snapshot = _served(dataset)
        ready = self._new_heads(dataset, snapshot, max_age_s)
        reply = then(request, snapshot, ready, *arguments)
        return reply if isinstance(reply, Reply) else await reply

    def _dataset(self, encoded: bytes) -> Dataset:
        name = decoded(encoded).decode()
        try:
            return self._cache.dataset(name)
        except UnknownDataset as error:
            raise (_unknown(error) if name else _nameless()) from None

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

    def _row(self, request: Request, snapshot: Snapshot, ready: SnapshotHeads, key: bytes) -> Reply | Later:
        dataset, document = ready.dataset, snapshot.rows.get(key)
        if document is None:
            dataset.counts.http.misses += 1
            raise Problem(404, f"{dataset.name} has no row '{key[:_SHOWN_KEY_BYTES].decode(errors='replace')}'")
        dataset.counts.http.hits += 1
        size_bytes = len(document)
        headers = request.headers
        if b"accept" in headers:
            _negotiated(request, (_JSON,))
        form = JSON_GZIP if b"accept-encoding" in headers and _zipped(headers, size_bytes) else JSON
        tag = row_tag(document, form)
        if not conditions.NAMES.isdisjoint(headers) and _is_unchanged(
            headers, Validators(tag, modified=ready.modified)
        ):
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

    def _whole(self, request: Request, snapshot: Snapshot, ready: SnapshotHeads) -> Reply | Later:
        rows = snapshot.rows
        if rows.digest is None:
            if rows.count > AT_ONCE_ROWS or rows.size_bytes > PIECE_BYTES:
                return Deferred.fromCoroutine(self._digested(request, snapshot, ready))
            for _ in rows.digesting():
                pass
        return self._whole_tagged(request, snapshot, ready)

    async def _digested(self, request: Request, snapshot: Snapshot, ready: SnapshotHeads) -> Reply:
        await self._digests.compute(snapshot.rows)
        # The digest may take a second, and the snapshot has aged meanwhile.
        ready = self._new_heads(ready.dataset, snapshot, ready.asked_max_age_s)
        return self._whole_tagged(request, snapshot, ready)

    def _whole_tagged(self, request: Request, snapshot: Snapshot, ready: SnapshotHeads) -> Reply:
        dataset, rows, headers = ready.dataset, snapshot.rows, request.headers
        dataset.counts.http.hits += 1
        lines = b"accept" in headers and _negotiated(request, (_JSON, NDJSON.content_type)) == NDJSON.content_type
        zipped = b"accept-encoding" in headers and _zipped(headers, rows.size_bytes)
        form = (NDJSON_GZIP if zipped else NDJSON) if lines else (JSON_GZIP if zipped else JSON)
        tag = whole_tag(rows, form)
        if not conditions.NAMES.isdisjoint(headers) and _is_unchanged(
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
        if rows.count <= _AT_ONCE_ROWS and rows.size_bytes <= PIECE_BYTES:
            return Reply(head, b"".join(pieces))
        return Reply(head, Streamed(pieces, {dataset.name: snapshot}))


# The parts of a request


def is_probe(request: Request) -> bool:
    """Return True if the request is for a probe or the metrics."""
    return request.target.partition(b"?")[0] in _PROBES


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


def _path_of_absolute(target: bytes) -> bytes:
    """Return the path of ``http://host/path``.

    Clients send this form to proxies, and servers must accept it (RFC 9112, 3.2.2).
    """
    origin = _ORIGIN.match(target)
    return (target[origin.end() :] or b"/") if origin else target


def _query(request: Request) -> bytes:
    return request.target.partition(b"?")[2]


def _check(request: Request) -> None:
    """Check the method and the parameters of a request without parameters.

    :raises Problem: 405 for a method other than GET and HEAD, 400 for any parameter.
    """
    _check_method(request)
    if b"?" in request.target:
        parameters.check(_query(request))


def _check_method(request: Request) -> None:
    if request.method not in _READ_METHODS:
        raise Problem(405, "this port only reads: use GET or HEAD", b"Allow: GET, HEAD\r\n")


def _negotiated(request: Request, offered: tuple[bytes, ...]) -> bytes:
    chosen = negotiation.media_type(request.headers.get(b"accept"), offered)
    if chosen is None:
        raise Problem(406, f"this is served as {' or '.join(offer.decode() for offer in offered)}")
    return chosen


def _zipped(headers: Mapping[bytes, bytes], size_bytes: int) -> bool:
    """Return True if the body must be sent as gzip.

    The client requests gzip and the body is large enough, or the client accepts no other coding.

    :raises Problem: 406 if the client accepts neither.
    """
    codings = negotiation.codings(headers.get(b"accept-encoding"))
    if codings.gzip and size_bytes >= _GZIP_FROM_BYTES:
        return True
    if codings.identity_allowed:
        return False
    if codings.gzip_allowed:
        return True
    raise Problem(406, "this is served plain or as gzip")


def _is_unchanged(headers: Mapping[bytes, bytes], current: Validators) -> bool:
    """Return True if the client already has the representation.

    :raises Problem: 412 if the preconditions of the request are not met.
    """
    return not conditions.NAMES.isdisjoint(headers) and conditions.is_not_modified(headers, current)


# The state of a dataset


def _served(dataset: Dataset) -> Snapshot:
    """Return the served snapshot.

    :raises Problem: 503 if no snapshot is loaded, or if it is expired and `on_expired` is "refuse".
    """
    snapshot = dataset.snapshot
    if snapshot is None:
        raise _not_loaded(dataset)
    if dataset.settings.on_expired == "refuse" and dataset.state() is State.EXPIRED:
        dataset.counts.http.stale += 1
        age_s, limit_s = dataset.age_s() or 0.0, dataset.settings.max_age_s
        raise Problem(
            503,
            f"{dataset.name} is {age_s:.0f} s old, limit {limit_s:g} s",
            _retry_after(dataset),
            {"age_s": round(age_s, 3), "max_age_s": limit_s},
        )
    return snapshot


def _nothing_here() -> Problem:
    return Problem(404, "there is nothing at this path; GET /v1/datasets lists what there is")


def _slash_at_the_end() -> Problem:
    return Problem(404, "there is nothing at this path; leave out the slash at its end")


def _nameless() -> Problem:
    return Problem(
        404, "there is nothing at /v1/datasets/ without a name; GET /v1/datasets, without the slash, lists the datasets"
    )


def _unknown(error: UnknownDataset) -> Problem:
    return Problem(404, f"{error}; GET /v1/datasets lists them")


def _not_loaded(dataset: Dataset) -> Problem:
    dataset.counts.http.loading += 1
    return Problem(503, f"{dataset.name} has not been loaded yet", _retry_after(dataset))


def _retry_after(dataset: Dataset) -> bytes:
    return b"Retry-After: %d\r\n" % max(1, math.ceil(dataset.next_refresh_in_s() or 0.0))
