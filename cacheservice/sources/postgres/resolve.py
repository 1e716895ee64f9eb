"""Name look-ups that cannot block the reactor or the stop of the service.

getaddrinfo cannot be cancelled, and Twisted's own pool joins its threads at exit, so that one dead name server would
delay the whole stop. These threads are daemons and are never joined.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial
from threading import Thread
from typing import Any, TypeVar, cast

from twisted.internet._resolver import GAIResolver
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHostResolution, IReactorThreads, IResolutionReceiver
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from cacheservice.base.errors import DatabaseUnavailable
from cacheservice.base.interfaces import Reactor

_MOST_THREADS = 16
_SHARED_FOR_S = 10.0
"""A look-up of the same name that is younger than this is shared, so that a hanging name cannot occupy every thread."""


@implementer(IResolutionReceiver)
class _Addresses:
    def __init__(self, done: Deferred[Sequence[str]]) -> None:
        self._done = done
        self._found: list[str] = []

    def resolutionBegan(self, resolution: IHostResolution) -> None:
        self._name = resolution.name

    def addressResolved(self, address: IPv4Address | IPv6Address) -> None:
        self._found.append(address.host)

    def resolutionComplete(self) -> None:
        if self._done.called:
            return  # abandoned meanwhile
        if self._found:
            self._done.callback(list(dict.fromkeys(self._found)))
        else:
            self._done.errback(DatabaseUnavailable(f'the name look-up of "{self._name}" found no address'))


T = TypeVar("T")


class Resolver:
    """Looks names up in a few threads of its own, which `stop` abandons.

    :param reactor: receives the results; its clock must be monotonic.
    """

    def __init__(self, reactor: Reactor, getaddrinfo: Callable[..., Any] = socket.getaddrinfo) -> None:
        self._pool = ThreadPool(0, _MOST_THREADS, "name look-ups")
        self._pool.threadFactory = partial(Thread, daemon=True)  # type: ignore[assignment]
        self._reactor = reactor
        self._under_way: dict[str, tuple[float, list[Deferred[Sequence[str]]]]] = {}
        self._resolver = GAIResolver(
            cast("IReactorThreads", reactor), lambda: self._pool, getaddrinfo=partial(_look_up, getaddrinfo)
        )

    async def resolve(self, name: str) -> Sequence[str]:
        """Return the addresses of `name`, in the order of the system's preference.

        :raises DatabaseUnavailable: if it has none.
        """
        wanted: Deferred[Sequence[str]] = Deferred()
        began_at, waiting = self._under_way.get(name, (0.0, []))
        waiting.append(wanted)
        if len(waiting) == 1 or self._reactor.seconds() >= began_at + _SHARED_FOR_S:
            self._under_way[name] = self._reactor.seconds(), waiting
            self._look_up(name).addBoth(self._answer, name, waiting)
        return await wanted

    def _look_up(self, name: str) -> Deferred[Sequence[str]]:
        if not self._pool.started:
            self._pool.start()
        done: Deferred[Sequence[str]] = Deferred()
        self._resolver.resolveHostName(cast("IResolutionReceiver", _Addresses(done)), name)
        return done

    def _answer(self, result: Sequence[str] | Failure, name: str, waiting: list[Deferred[Sequence[str]]]) -> None:
        if self._under_way.get(name, (0.0, None))[1] is waiting:
            del self._under_way[name]
        answered, waiting[:] = list(waiting), []
        for each in answered:
            if not each.called:  # cancelled meanwhile
                each.callback(result)

    def stop(self) -> None:
        """End the idle threads.

        A thread that is stuck in a look-up ends with the look-up or with the process.
        """
        if self._pool.started:
            self._pool.adjustPoolsize(0, 0)


def _look_up(getaddrinfo: Callable[..., T], *arguments: object) -> T:
    try:
        return getaddrinfo(*arguments)
    except ValueError as error:
        # An impossible name, such as "db..example"; GAIResolver would never complete.
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from error
