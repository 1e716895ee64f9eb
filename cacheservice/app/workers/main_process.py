"""The main process, as a worker asks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice.app.no_reads import RefusedRefreshes
from cacheservice.app.workers.counting import totals_in
from cacheservice.app.workers.streams import Pulled
from cacheservice.base.errors import MainUnavailable, UnknownDataset
from cacheservice.base.interfaces import Json, Log
from cacheservice.cache.cache import Cache
from cacheservice.ports.http.access import Rights
from cacheservice.ports.http.messages import Reply, Request
from cacheservice.ports.resp.whole import ServiceInfo
from cacheservice.ports.rotation import ClientSecrets, Secrets
from cacheservice.replication.link import CallFailed, CallTimedOut, Link, LinkLost
from cacheservice.replication.messages import Plain

ANSWER_S = 5.0
"""The time that the main process has to answer."""

T = TypeVar("T")


class MainProcess(RefusedRefreshes):
    """Asks the main process for what is of the whole service.

    It is the `Whole` of the RESP port, the `Main` of the HTTP port, and the `Refreshes` of both. Commands
    are passed on as HTTP requests, so it only needs `refresh_since`.

    :param cache: of this worker.
    """

    def __init__(self, cache: Cache, link: Link) -> None:
        self._cache = cache
        self._link = link

    # For the RESP port

    def info(self) -> Deferred[ServiceInfo]:
        """Return the facts of INFO."""

        def read(answer: Plain) -> ServiceInfo:
            found = cast("dict[str, Any]", answer)
            return ServiceInfo(found["pid"], found["uptime_s"], totals_in(found["totals"]))

        return self._ask("info").addCallback(read)

    def client_list(self) -> Deferred[bytes]:
        """Return the lines of CLIENT LIST."""
        return cast("Deferred[bytes]", self._ask("client_list"))

    def dataset(self, name: str) -> Deferred[Mapping[str, Json]]:
        """Return the fields of CACHE.INFO."""

        def read(found: Plain) -> Mapping[str, Json]:
            if found is None:
                raise UnknownDataset(f"unknown dataset '{name}'")
            return cast("Mapping[str, Json]", found)

        return self._ask("dataset", dataset=name).addCallback(read)

    # For the HTTP port

    def ask(self, request: Request, rights: Rights) -> Deferred[Reply]:
        """Return the reply to a request whose access and form have been checked."""
        # The main process does not need the token.
        headers: list[Plain] = [[name, value] for name, value in request.headers.items() if name != b"authorization"]
        asked = self._ask(
            "http",
            method=request.method,
            target=request.target,
            headers=headers,
            peer=request.host(),
            rights=rights,
        )

        def read(answer: Plain) -> Reply:
            found = cast("dict[str, Any]", answer)
            body, stream, endless = found["body"], found["stream"], found["endless"]
            if stream is not None:
                body = Pulled(self._link, stream, endless=endless)
            elif body is None and not found["is_bodiless"]:
                body = iter(())
            return Reply(found["head"], body, found["size_bytes"], endless)

        return _shielded(asked.addCallback(read))

    # Refreshes

    def refresh_since(self, name: str, moment: float) -> None:
        """Have the main process ensure that a refresh begins at or after `moment`; see `Refreshes`."""
        self._cache.dataset(name)
        self._link.send("refresh_since", dataset=name, moment=moment)

    def _ask(self, name: str, **fields: Plain) -> Deferred[Plain]:
        return self._link.call(name, ANSWER_S, **fields).addErrback(_unavailable)


class AskedSecrets(Secrets):
    """The secrets of a worker. The main process reads their files, and sends those that have changed."""

    def __init__(self, started: ClientSecrets, link: Link, log: Log) -> None:
        super().__init__(started, log)
        self._link = link
        link.handle("secrets", lambda secrets: self.take(secrets) and None)

    def look(self) -> Deferred[None] | None:
        """Have the main process read the files: a `Look`. New secrets arrive before the answer."""
        # Without an answer the old secrets are in effect, and the client is refused.
        return self._link.call("look", ANSWER_S).addBoth(lambda _: None)


def _shielded(coming: Deferred[T]) -> Deferred[T]:
    """Return a Deferred whose end does not cancel `coming`, so that its result is received and freed."""
    shield: Deferred[T] = Deferred()
    coming.addCallbacks(shield.callback, shield.errback)
    return shield


def _unavailable(failure: Failure) -> None:
    failure.trap(LinkLost, CallTimedOut, CallFailed)
    raise MainUnavailable(
        f"the main process did not answer this worker ({failure.getErrorMessage()}); repeat the request"
    ) from None
