"""The commands of the admin socket over HTTP.

They need http.admin_token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from cacheservice.base.errors import NothingToPin, NothingToRollBackTo, Stopped
from cacheservice.cache.cache import Refreshes
from cacheservice.ports.http import conditions
from cacheservice.ports.http.messages import Reply, Request, WallClock, live
from cacheservice.ports.http.problem import Problem
from cacheservice.ports.http.reads import Reads
from cacheservice.ports.http.request_head import announces_body

Done = tuple[int, Mapping[str, object]]
"""The status of the response (202 if the command has only started) and its JSON value."""


def run(command: bytes, refreshes: Refreshes, name: str) -> Done:
    """Run a command on a dataset, which must exist.

    :raises Problem: 409 if the command is not possible now, 503 if the process is stopping,
        or does not refresh.
    """
    try:
        return COMMANDS[command](refreshes, name)
    except (NothingToPin, NothingToRollBackTo) as error:
        raise Problem(409, str(error)) from None
    except Stopped as error:
        raise Problem(503, str(error)) from None


def _refresh(refreshes: Refreshes, name: str) -> Done:
    started = refreshes.refresh_now(name)
    return 202, {"dataset": name, "refresh": "started" if started else "follows the one that is running"}


def _accept(refreshes: Refreshes, name: str) -> Done:
    refreshes.accept_next(name)
    return 200, {"dataset": name, "accepts_next": True}


def _pin(refreshes: Refreshes, name: str) -> Done:
    return 200, {"dataset": name, "pinned": refreshes.pin(name)}


def _unpin(refreshes: Refreshes, name: str) -> Done:
    return 200, {"dataset": name, "unpinned": refreshes.unpin(name)}


def _roll_back(refreshes: Refreshes, name: str) -> Done:
    return 202, {"dataset": name, "going_back_to": refreshes.roll_back(name)}


COMMANDS: Mapping[bytes, Callable[[Refreshes, str], Done]] = MappingProxyType(
    {b"refresh": _refresh, b"accept": _accept, b"pin": _pin, b"unpin": _unpin, b"rollback": _roll_back}
)


class Commands:
    """Runs the commands of requests.

    Browsers never send the Authorization header that a command needs on behalf of another site.

    :param wall_s: returns seconds since the epoch, for dates.
    """

    def __init__(self, reads: Reads, refreshes: Refreshes, wall_s: WallClock) -> None:
        self._reads = reads
        self._refreshes = refreshes
        self._wall_s = wall_s

    def run(self, request: Request, name: bytes, command: bytes) -> Reply:
        """Run a command on a dataset; `name` is as in the path."""
        if announces_body(request.headers):
            raise Problem(413, "a command takes no request body")
        dataset = self._reads.dataset(name)
        if b"if-match" in request.headers:
            # If-Match refers to a representation of the target, and a command has none (RFC 9110, 13.1.1).
            raise conditions.precondition_failed()
        status, value = run(command, self._refreshes, dataset.name)
        return live(status, value, self._wall_s(), request)
