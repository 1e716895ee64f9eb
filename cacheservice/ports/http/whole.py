"""Requests that need the facts of the whole service.

A process that is the whole service answers them itself. A worker is only a part of the service: it checks the access
and the form of a request, and passes it on to the main process, which answers it with the same handlers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from cacheservice.ports.http.access import Access, Checking, Level, Rights
from cacheservice.ports.http.messages import Reply, Request
from cacheservice.ports.http.problem import Problem
from cacheservice.ports.http.routes import Routes


class Passed(NamedTuple):
    """A request that another process has received, and whose access and form it has checked.

    :param peer: the IP address of the client.
    :param rights: those of the token of the client.
    """

    method: bytes
    target: bytes
    headers: Mapping[bytes, bytes]
    peer: str
    rights: Rights

    def host(self) -> str:
        return self.peer


class CheckedElsewhere(Access):
    """The access of requests that another process has checked.

    :param has_commands: whether a token for commands is configured.
    """

    def __init__(self, *, has_commands: bool) -> None:
        super().__init__(None, allow_data=True)
        self.has_commands = has_commands

    def is_free(self, level: Level) -> bool:
        return True

    def check(self, level: Level, request: Request) -> Checking | None:
        return None

    def rights(self, request: Request) -> Rights:
        assert isinstance(request, Passed), "only such requests come here"
        return request.rights


class Answers:
    """Answers the requests that workers pass on, with the handlers of this process.

    :param routes: with the access `CheckedElsewhere`.
    """

    _log = Logger()

    def __init__(self, routes: Routes) -> None:
        self._routes = routes

    def answer(self, request: Passed) -> Deferred[Reply]:
        """Return the reply, which may be a refusal; it never fails."""
        return Deferred.fromCoroutine(self._answer(request))

    async def _answer(self, request: Passed) -> Reply:
        try:
            reply = self._routes.answer(request)
            return reply if isinstance(reply, Reply) else await reply
        except Problem as problem:
            return self._routes.refusal(problem, request.target)
        except Exception:
            self._log.failure("an HTTP request could not be answered", Failure())
            return self._routes.refusal(Problem(500, "an internal error; its traceback is in the log"), request.target)
