"""The routes of the HTTP port, in one table.

It also has the steps from a request to its handler.

Under /v1/ access is checked first, so that a client without the token does not learn what exists. Elsewhere the form of
a request, its method and its parameters, is checked first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, NoReturn, Protocol

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice.base.errors import MainUnavailable
from cacheservice.ports.http import parameters, response_heads
from cacheservice.ports.http.access import Access, Checking, Level, Rights
from cacheservice.ports.http.commands import COMMANDS, Commands
from cacheservice.ports.http.data import Data
from cacheservice.ports.http.messages import READ_METHODS, Later, Reply, Request, WallClock, query_of
from cacheservice.ports.http.monitors import MetricsPage, Probes
from cacheservice.ports.http.pages import Pages
from cacheservice.ports.http.problem import Problem
from cacheservice.ports.http.reports import Reports

_SECRET = b"/v1/"
_OPEN_PATHS = frozenset({b"/livez", b"/readyz", b"/metrics"})
_TARGET = re.compile(rb"[!-\"$-~]+")
_ORIGIN = re.compile(rb"https?://[^/?]+", re.IGNORECASE)
_SLASH_AT_THE_END = re.compile(rb"/v1/datasets/[^/]*/")
_PARTS = {"{name}": "([^/]*)", "{command}": f"({'|'.join(name.decode() for name in COMMANDS)})", "{rest}": "(.*)"}
"""The parts of the templates: a part of a path, a command, and the rest of a path with all its slashes."""

_POST = (b"POST",)

Handler = Callable[..., Reply | Later]
"""Takes the request and the parts of its path; raises `Problem`."""


class Main(Protocol):
    """The main process, as a worker passes requests on to it."""

    def ask(self, request: Request, rights: Rights) -> Deferred[Reply]:
        """Return the reply of the main process. It fails with `MainUnavailable` if there is none."""


class Route(NamedTuple):
    """A template of paths, and the handler of requests for them.

    :param is_of_whole: whether the reply needs the facts of the whole service, so that a worker passes the request on.
    """

    methods: tuple[bytes, ...]
    template: str
    handler: Handler
    level: Level
    takes_parameters: bool = False
    is_of_whole: bool = False


class Handlers(NamedTuple):
    """The handlers of all routes.

    :param metrics: None for no page of metrics.
    """

    data: Data
    reports: Reports
    commands: Commands
    probes: Probes
    pages: Pages
    metrics: MetricsPage | None


def table(handlers: Handlers, *, has_commands: bool) -> list[Route]:
    """Return all routes. Each path fits at most one of them; the hottest is first."""
    data, reports, commands, probes, pages, metrics = handlers
    routes = [
        Route(READ_METHODS, "/v1/datasets/{name}/rows/{rest}", data.row, Level.READ, takes_parameters=True),
        Route(READ_METHODS, "/v1/datasets/{name}", data.whole, Level.READ, takes_parameters=True),
        Route(READ_METHODS, "/v1/datasets", reports.all_datasets, Level.READ, is_of_whole=True),
        Route(READ_METHODS, "/v1/datasets/{name}/status", reports.status, Level.READ, is_of_whole=True),
        Route(READ_METHODS, "/v1/datasets/{name}/why", reports.why, Level.READ, is_of_whole=True),
        Route(READ_METHODS, "/v1/datasets/{name}/history", reports.history, Level.READ, is_of_whole=True),
        Route(READ_METHODS, "/livez", probes.alive, Level.OPEN),
        Route(READ_METHODS, "/readyz", probes.ready, Level.OPEN, is_of_whole=True),
        # The page decides about access itself: without the token, it prompts for it.
        Route(READ_METHODS, "/", pages.page, Level.OPEN),
        Route(READ_METHODS, "/assets/{rest}", pages.asset, Level.PUBLIC),
        Route(READ_METHODS, "/events", pages.events, Level.LISTEN, is_of_whole=True),
    ]
    if has_commands:
        routes.append(Route(_POST, "/v1/datasets/{name}/{command}", commands.run, Level.COMMAND, is_of_whole=True))
    else:
        routes.append(Route(READ_METHODS, "/v1/datasets/{name}/{command}", _nothing, Level.READ))
    if metrics is not None:
        routes.append(Route(READ_METHODS, "/metrics", metrics.page, Level.OPEN, is_of_whole=True))
    else:
        routes.append(Route(READ_METHODS, "/metrics", _nothing, Level.OPEN, is_of_whole=True))
    return routes


class Routes:
    """Passes requests to their handlers.

    :param wall_s: returns seconds since the epoch, for dates.
    :param main: answers the requests that need the facts of the whole service; None if this process is the whole.
    """

    def __init__(self, routes: list[Route], access: Access, wall_s: WallClock, main: Main | None = None) -> None:
        self._access = access
        self._wall_s = wall_s
        self._main = main
        if main is not None:
            routes = [
                route._replace(handler=partial(self._pass_on, route.level)) if route.is_of_whole else route
                for route in routes
            ]
        self._routes = [(_pattern(route.template), route, access.is_free(route.level)) for route in routes]

    def answer(self, request: Request) -> Reply | Later:
        """Return the reply to a request, now or later.

        :raises Problem: if the request cannot be fulfilled; a later reply raises it too.
        """
        target = request.target
        path = target.partition(b"?")[0]
        if path[:1] != b"/":
            path = _path_of_absolute(path)
        if not _TARGET.fullmatch(target):
            raise Problem(400, "the request's target may hold printable ASCII only; encode the rest as %XX")
        for pattern, route, is_free in self._routes:
            if (match := pattern.fullmatch(path)) is not None:
                checking = None if is_free else self._check(request, route, path)
                if checking is not None:
                    return self._answer_again(checking, request)
                _check_form(request, route)
                return route.handler(request, *match.groups())
        checking = self._access.check(Level.READ, request) if path[:4] == _SECRET else None
        if checking is not None:
            return self._answer_again(checking, request)
        raise _nothing_at(path)

    def _check(self, request: Request, route: Route, path: bytes) -> Checking | None:
        """Check the access of a request, and outside of /v1/ first its form."""
        if path[:4] != _SECRET:
            _check_form(request, route)
            return self._access.check(route.level, request)
        # Only a command needs the token for commands.
        return self._access.check(route.level if request.method in route.methods else Level.READ, request)

    def refusal(self, problem: Problem, target: bytes) -> Reply:
        """Return the response to a request that cannot be fulfilled.

        :param target: of the request, empty if it is not known.
        """
        head = response_heads.plain_head(problem.status, b"application/problem+json", self._wall_s())
        return Reply(head + problem.headers, problem.body(target))

    def _pass_on(self, level: Level, request: Request, *_: bytes) -> Deferred[Reply]:
        assert self._main is not None, "this process is a part of the service"
        # Other levels do not depend on the rights, and a token that was not checked must not be compared.
        rights = self._access.rights(request) if level is Level.LISTEN else "read"
        return self._main.ask(request, rights).addErrback(_refuse_without_main)

    async def _answer_again(self, checking: Checking, request: Request) -> Reply:
        """Answer a request whose token was wrong, and has become right."""
        await checking
        answer = self.answer(request)
        return answer if isinstance(answer, Reply) else await answer


def _refuse_without_main(failure: Failure) -> NoReturn:
    failure.trap(MainUnavailable)
    raise Problem(503, str(failure.value), b"Retry-After: 1\r\n") from None


def is_probe(request: Request) -> bool:
    """Return True if the request is for a probe or the metrics.

    They are served over the limit of connections, too.
    """
    return request.target.partition(b"?")[0] in _OPEN_PATHS


def _pattern(template: str) -> re.Pattern[bytes]:
    for part, pattern in _PARTS.items():
        template = template.replace(part, pattern)
    return re.compile(template.encode())


def _path_of_absolute(target: bytes) -> bytes:
    """Return the path of ``http://host/path``.

    Clients send this form to proxies, and servers must accept it (RFC 9112, 3.2.2).
    """
    origin = _ORIGIN.match(target)
    return (target[origin.end() :] or b"/") if origin else target


def _check_form(request: Request, route: Route) -> None:
    """Check the method, and that there are no parameters if the route takes none.

    :raises Problem: 405, or 400.
    """
    if request.method not in route.methods:
        raise _not_allowed(route)
    if not route.takes_parameters and b"?" in request.target:
        parameters.check(query_of(request))


def _not_allowed(route: Route) -> Problem:
    if route.methods == _POST:
        return Problem(405, "commands are sent with POST", b"Allow: POST\r\n")
    return Problem(405, "this port only reads: use GET or HEAD", b"Allow: GET, HEAD\r\n")


def _nothing(request: Request, *parts: bytes) -> Reply:
    """Refuse a request for a page that this port does not have.

    :raises Problem: 404.
    """
    raise _nothing_at(b"")


def _nothing_at(path: bytes) -> Problem:
    if _SLASH_AT_THE_END.fullmatch(path):
        return Problem(404, "there is nothing at this path; leave out the slash at its end")
    return Problem(404, "there is nothing at this path; GET /v1/datasets lists what there is")
