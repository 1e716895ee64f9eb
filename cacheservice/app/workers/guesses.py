"""Guesses of passwords that all processes share, so that a guess at one worker counts at all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal, cast

from cacheservice.ports.throttle import Failures, Guess, Proof, State, Throttle
from cacheservice.replication.link import Link
from cacheservice.replication.messages import Plain

Fate = Literal["failed", "withdrawn", "succeeded"]


class SharedGuesses:
    """The guesses of the ports of a worker. Sends each to the main process, and takes those of the other workers."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._throttles: dict[str, Throttle] = {}
        link.handle("guess", self._guess)
        link.handle("guesses", self._guesses)

    def add(self, port: str, throttle: Throttle) -> None:
        """Share the guesses at a port."""
        self._throttles[port] = throttle
        throttle.share(partial(self._shared, port))

    def _shared(self, port: str, guess: Guess) -> None:
        self._link.send("guess", port=port, **guess._asdict())

    def _guess(self, port: str, fate: Fate, host: str, secret: str) -> None:
        if (throttle := self._throttles.get(port)) is not None:
            throttle.take(Guess(fate, host, secret))

    def _guesses(self, port: str, failures: Plain, proven: Plain) -> None:
        if (throttle := self._throttles.get(port)) is not None:
            throttle.restore(State(cast("Sequence[Failures]", failures), cast("Sequence[Proof]", proven)))


class AllGuesses:
    """The guesses at all workers, in the main process. It passes each on to the other workers.

    :param now: the monotonic clock, in seconds.
    :param links: returns those of all workers.
    """

    def __init__(self, ports: Iterable[str], now: Callable[[], float], links: Callable[[], Iterable[Link]]) -> None:
        self._throttles: Mapping[str, Throttle] = {port: Throttle(now) for port in ports}
        self._links = links

    def add(self, link: Link) -> None:
        """Take the guesses of a new worker, after it has got all that is known."""
        link.handle("guess", partial(self._guess, link))
        for port, throttle in self._throttles.items():
            failures, proven = throttle.state()
            link.send("guesses", port=port, failures=_plain(failures), proven=_plain(proven))

    def _guess(self, by: Link, port: str, fate: Fate, host: str, secret: str) -> None:
        self._throttles[port].take(Guess(fate, host, secret))
        for link in self._links():
            if link is not by:
                link.send("guess", port=port, fate=fate, host=host, secret=secret)


def _plain(rows: Iterable[Sequence[Plain]]) -> Plain:
    return [list(row) for row in rows]
