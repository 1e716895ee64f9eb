"""Requests and replies, as the handlers of the routes see them."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import NamedTuple, Protocol

from twisted.internet.defer import Deferred

from cacheservice.ports.http import conditions, negotiation, response_heads
from cacheservice.ports.http.bodies import Piece
from cacheservice.ports.http.conditions import Validators
from cacheservice.ports.http.problem import Problem

READ_METHODS = (b"GET", b"HEAD")
JSON_TYPE = b"application/json"
GZIP_FROM_BYTES = 1024
"""Below this size, gzip's header and the client's work cost more than compression saves."""

WallClock = Callable[[], float]
"""Returns seconds since the epoch, for dates."""


class Request(Protocol):
    """The head of a request, and the address of its client.

    `target` is as received; `headers` are by their names in lower case.
    """

    @property
    def method(self) -> bytes: ...

    @property
    def target(self) -> bytes: ...

    @property
    def headers(self) -> Mapping[bytes, bytes]: ...

    def host(self) -> str:
        """Return the IP address of the client; empty if it has none."""


class Reply(NamedTuple):
    """A response without the lines that frame its body.

    `body` is bytes, or pieces of `size_bytes` in total if that is known; None for a 304, which has no body. An
    `endless` body ends with the connection.
    """

    head: bytes
    body: bytes | Iterator[Piece] | None
    size_bytes: int | None = None
    endless: bool = False


Later = Coroutine[Deferred[object], object, Reply] | Deferred[Reply]
"""A reply that is not ready. A Deferred fires without further events; a coroutine waits for one, such as a refresh."""


def live(status: int, value: object, wall_s: float, request: Request | None = None) -> Reply:
    """Return a live state, which caches must not store, as JSON.

    :param request: to negotiate with; None for a probe, which always gets JSON.
    """
    if request is not None:
        negotiated(request, (JSON_TYPE,))
        if status == 200 and request.method in READ_METHODS and is_unchanged(request.headers, Validators()):
            return Reply(response_heads.plain_head(304, JSON_TYPE, wall_s), None)
    return Reply(response_heads.plain_head(status, JSON_TYPE, wall_s), json.dumps(value).encode() + b"\n")


def query_of(request: Request) -> bytes:
    """Return the part of the target after the question mark."""
    return request.target.partition(b"?")[2]


def negotiated(request: Request, offered: tuple[bytes, ...]) -> bytes:
    """Return the media type that the client prefers.

    :raises Problem: 406 if it accepts none of those offered.
    """
    chosen = negotiation.media_type(request.headers.get(b"accept"), offered)
    if chosen is None:
        raise Problem(406, f"this is served as {' or '.join(offer.decode() for offer in offered)}")
    return chosen


def wants_gzip(headers: Mapping[bytes, bytes], size_bytes: int) -> bool:
    """Return True if the body must be sent as gzip.

    The client requests gzip and the body is large enough, or the client accepts no other coding.

    :raises Problem: 406 if the client accepts neither.
    """
    codings = negotiation.codings(headers.get(b"accept-encoding"))
    if codings.gzip and size_bytes >= GZIP_FROM_BYTES:
        return True
    if codings.identity_allowed:
        return False
    if codings.gzip_allowed:
        return True
    raise Problem(406, "this is served plain or as gzip")


def is_unchanged(headers: Mapping[bytes, bytes], current: Validators) -> bool:
    """Return True if the client already has the representation.

    :raises Problem: 412 if the preconditions of the request are not met.
    """
    return not conditions.NAMES.isdisjoint(headers) and conditions.is_not_modified(headers, current)
