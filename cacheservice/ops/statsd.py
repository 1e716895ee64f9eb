"""Pushes the metrics to a StatsD server over UDP.

The format is github.com/statsd/statsd, docs/metric_types.md.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Protocol

from twisted.application.service import Service
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.error import CannotListenError, MessageLengthError
from twisted.internet.protocol import DatagramProtocol

from cacheservice.base.errors import CacheServiceError
from cacheservice.base.interfaces import Log, Reactor
from cacheservice.base.tasks import Tasks
from cacheservice.base.timers import looping, pause
from cacheservice.config import StatsdSettings
from cacheservice.ops.dataset_metrics import Sample
from cacheservice.ops.exposition import Metrics

INTERVAL_S = 10.0
"""StatsD's own default interval between flushes."""
MOST_PACKET_BYTES = 1432
"""The advice of StatsD's documentation for a network with frames of 1500 bytes. It advises 512 for the worst path and
8932 for jumbo frames."""
_PACKETS_A_TURN = 8
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_-]")
_OF_NO_USE = ("_bucket", "_info")
"""Endings of names of series that StatsD cannot use."""


class StatsD(Service):
    """Sends all metrics each `interval_s` while it runs.

    It does so whether or not a server receives them. Gauges are sent as they are, counters as their increase since the
    last push. Count and sum of a histogram are counters; its buckets are not sent, because StatsD has no such type.

    :param resolve: returns the addresses of a name, without blocking the reactor; its failure is a `CacheServiceError`.
    :param reactor: `IReactorTime` and `IReactorUDP`.
    """

    name = "statsd"

    def __init__(
        self,
        metrics: Metrics,
        settings: StatsdSettings,
        resolve: Callable[[str], Awaitable[Sequence[str]]],
        reactor: Reactor,
        log: Log,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._metrics = metrics
        self._host = settings.host
        self._port = settings.port
        self._lines = Lines(settings.prefix)
        self._resolve = resolve
        self._reactor = reactor
        self._log = log
        self._interval_s = interval_s
        self._loop = looping(reactor, lambda: self._tasks.run(self._push()))
        self._tasks = Tasks(log)
        self._sender: _Sender | None = None
        self._problem: str | None = None

    def startService(self) -> None:
        super().startService()
        self._loop.start(self._interval_s)

    def stopService(self) -> Deferred[object]:
        """Stop; the Deferred fires when the socket is closed."""
        super().stopService()
        if self._loop.running:
            self._loop.stop()
        self._tasks.cancel()
        return self._close()

    async def _push(self) -> None:
        """Send all metrics once."""
        # The result of the last push is known by now. Each push has its own socket, so it uses the current address of
        # the name and a current address of this machine.
        problem = None if self._sender is None else self._sender.problem()
        await self._close()
        try:
            sender = self._sender = await self._open()
            for number, packet in enumerate(packets(self._lines.of(self._metrics.samples())), 1):
                sender.send(packet)
                if number % _PACKETS_A_TURN == 0:
                    await pause(self._reactor)
        except (OSError, CannotListenError, MessageLengthError, CacheServiceError) as error:
            problem = getattr(error, "strerror", None) or str(error)
        self._log_change(problem)

    def _log_change(self, problem: str | None) -> None:
        """Log a problem once when it begins, and once when it is over."""
        if problem is not None and self._problem is None:
            self._log.warning("statsd_unreachable", error=problem.lower(), host=self._host, port=self._port)
        elif problem is None and self._problem is not None:
            self._log.info("statsd_recovered", host=self._host, port=self._port)
        self._problem = problem

    async def _open(self) -> _Sender:
        address = self._host
        if not isIPAddress(address) and not isIPv6Address(address):
            address, *_ = await self._resolve(address)
        sender = _Sender()
        self._reactor.listenUDP(0, sender, interface="::" if isIPv6Address(address) else "")
        # No answers are expected. Twisted's reading would consume refusals before this class, and fail on other errors.
        sender.transport.stopReading()
        try:
            sender.transport.connect(address, self._port)
        except OSError:
            await maybeDeferred(sender.transport.stopListening)
            raise
        return sender

    def _close(self) -> Deferred[object]:
        sender, self._sender = self._sender, None
        return maybeDeferred(lambda: None if sender is None else sender.transport.stopListening())


class Lines:
    """The samples in StatsD's form: gauges as they are, counters as their increase since the last push."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._sent: dict[str, float] = {}

    def of(self, samples: Iterable[tuple[str, Sample]]) -> Iterator[str]:
        """Yield the lines of one push, and note the counters as sent."""
        for kind, sample in samples:
            if sample.name.endswith(_OF_NO_USE):
                continue
            key = self._key(sample)
            if kind == "gauge":
                yield f"{key}:{sample.value:.15g}|g"
                continue
            grown = sample.value - self._sent.get(key, 0.0)
            self._sent[key] = sample.value
            if grown:
                yield f"{key}:{grown:.15g}|c"

    def _key(self, sample: Sample) -> str:
        """Return the name of a sample in StatsD's form.

        `cacheservice_refresh_total{dataset="products",outcome="held"}` becomes `PREFIX.refresh_total.products.held`.
        """
        parts = [sample.name.removeprefix("cacheservice_"), *sample.labels.values()]
        named = [_NOT_IN_A_NAME.sub("_", part) for part in parts]
        return ".".join([self._prefix, *named] if self._prefix else named)


def packets(lines: Iterable[str]) -> Iterator[bytes]:
    """Yield packets with as many lines as fit."""
    waiting: list[bytes] = []
    size_bytes = 0
    for line in lines:
        encoded = line.encode()
        if waiting and size_bytes + len(encoded) > MOST_PACKET_BYTES:
            yield b"\n".join(waiting)
            waiting, size_bytes = [], 0
        waiting.append(encoded)
        size_bytes += len(encoded) + 1
    if waiting:
        yield b"\n".join(waiting)


class UdpTransport(Protocol):
    """The transport of a UDP socket: `IUDPTransport`, and Twisted's own."""

    socket: socket.socket

    def connect(self, host: str, port: int, /) -> object:
        """Send to this address only."""

    def write(self, packet: bytes, /) -> object:
        """Send a packet."""

    def stopReading(self) -> object:
        """Ignore what arrives."""

    def stopListening(self) -> Deferred[None] | None:
        """Close the socket."""


class _Sender(DatagramProtocol):
    """The socket of one push.

    A refusal arrives as ICMP, after the packet that is refused.
    """

    transport: UdpTransport  # type: ignore[assignment]  # Twisted declares an interface with fewer methods
    noisy = False

    def __init__(self) -> None:
        self._problem: str | None = None

    def send(self, packet: bytes) -> None:
        """Send a packet; if the buffer is full, it is lost as on the network.

        :raises OSError: if there is no route.
        """
        try:
            self.transport.write(packet)
        except BlockingIOError:
            self._problem = "the socket's buffer is full"

    def connectionRefused(self) -> None:
        self._problem = os.strerror(errno.ECONNREFUSED)

    def problem(self) -> str | None:
        """Return the error of the packets that were sent, as far as it is known."""
        error = self.transport.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return os.strerror(error) if error else self._problem
