"""Work in threads of the reactor's pool: files, compression, look-ups."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool

from cacheservice.base.interfaces import Reactor

P = ParamSpec("P")
T = TypeVar("T")


def in_thread(reactor: Reactor, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
    """Run `work` in a thread of the reactor's pool, and fire with its result in the reactor's."""
    return deferToThreadPool(cast("IReactorFromThreads", reactor), reactor.getThreadPool(), work, *args, **kwargs)
