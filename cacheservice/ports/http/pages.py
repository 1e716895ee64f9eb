"""Answers requests for the dashboard: its files and its event stream."""

from __future__ import annotations

from collections.abc import Mapping

from cacheservice.ports.http import assets, negotiation, response_heads
from cacheservice.ports.http.access import Access, Checking, Level
from cacheservice.ports.http.assets import Asset
from cacheservice.ports.http.conditions import Validators
from cacheservice.ports.http.events import Feed
from cacheservice.ports.http.guard import CHALLENGE
from cacheservice.ports.http.messages import Later, Reply, Request, WallClock, is_unchanged, negotiated, wants_gzip
from cacheservice.ports.http.problem import Problem

_HTML, _PROBLEM, _EVENTS = b"text/html", b"application/problem+json", b"text/event-stream"


class Pages:
    """Answers requests for the dashboard.

    :param files: the files of the dashboard by name.
    :param wall_s: returns seconds since the epoch, for dates.
    """

    def __init__(self, files: Mapping[bytes, Asset], feed: Feed, access: Access, wall_s: WallClock) -> None:
        self._files = files
        self._feed = feed
        self._access = access
        self._wall_s = wall_s

    def page(self, request: Request) -> Reply | Later:
        """Return the page, which contains no secret.

        If a token is required and missing, a browser gets the page with status 401, and the page prompts for the token.
        """
        page = self._files[assets.PAGE]
        if not self._access.reads_freely and b"authorization" not in request.headers:
            self._access.required_guard()
            if negotiation.media_type(request.headers.get(b"accept"), (_PROBLEM, _HTML)) == _HTML:
                return Reply(page.head(401, self._wall_s()) + CHALLENGE, page.plain)
        checking = self._access.check(Level.READ, request)
        return self._file(request, page) if checking is None else self._checked_page(checking, request)

    async def _checked_page(self, checking: Checking, request: Request) -> Reply:
        await checking
        return self._file(request, self._files[assets.PAGE])

    def asset(self, request: Request, name: bytes) -> Reply:
        """Return a file of the dashboard."""
        file = self._files.get(name)
        if file is None:
            raise Problem(404, "there is no such file of the dashboard")
        return self._file(request, file)

    def _file(self, request: Request, file: Asset) -> Reply:
        headers = request.headers
        zipped = b"accept-encoding" in headers and wants_gzip(headers, len(file.plain))
        if is_unchanged(headers, Validators(file.entity_tag(zipped))):
            return Reply(file.head(304, self._wall_s(), zipped), None)
        return Reply(file.head(200, self._wall_s(), zipped), file.zipped if zipped else file.plain)

    def events(self, request: Request) -> Reply:
        """Return the event stream, which has no end."""
        negotiated(request, (_EVENTS,))
        head = response_heads.plain_head(200, _EVENTS, self._wall_s())
        # nginx would hold back the events until its buffer is full.
        head += (
            b"X-Content-Type-Options: nosniff\r\nCross-Origin-Resource-Policy: same-origin\r\nX-Accel-Buffering: no\r\n"
        )
        return Reply(head, self._feed.follow(self._access.rights(request), self._access.has_commands), endless=True)
