"""The service of tac/cacheservice.tac with a watch on its reactor; only for benchmarks.stall.

Every millisecond it notes how long the reactor was away. A line to the unix socket CACHESERVICE_WATCH begins anew
and answers with what was noted before.
"""

import json
import os
import time

from twisted.application.internet import StreamServerEndpointService
from twisted.application.service import Application
from twisted.internet import reactor
from twisted.internet.endpoints import UNIXServerEndpoint
from twisted.internet.protocol import Factory
from twisted.logger import ILogObserver
from twisted.protocols.basic import LineOnlyReceiver

from cacheservice import app
from cacheservice.ops.logs import TwistedEvents

TICK_S = 0.001

reactor.seconds = time.monotonic
application = Application("cacheservice")


class Watch:
    """The longest turns of the reactor, by each of three clocks.

    `cpu_s` is what the reactor's thread itself computed between two ticks, `wall_s` how much later than due the tick
    came, and `own_s` that less the time in which the thread was ready to run and another process had its core.
    """

    CLOCKS = ("cpu_s", "wall_s", "own_s")

    def __init__(self):
        # Of this thread, in nanoseconds: run time, time on a run queue; and the number of slices.
        self._schedstat = open("/proc/thread-self/schedstat", "rb", buffering=0)
        self.begin()

    def begin(self):
        self.began_at = time.monotonic()
        self._turns = [(0.0, 0.0, 0.0, 0.0)]
        self._read()

    def _read(self):
        queued_ns = os.pread(self._schedstat.fileno(), 64, 0).split()[1]
        self._at, self._cpu_s, self._queued_s = time.monotonic(), time.thread_time(), int(queued_ns) / 1e9

    def tick(self):
        at, cpu_s, queued_s = self._at, self._cpu_s, self._queued_s
        self._read()
        wall_s = max(0.0, self._at - at - TICK_S)
        own_s = max(0.0, wall_s - (self._queued_s - queued_s))
        self._turns.append((self._cpu_s - cpu_s, wall_s, own_s, self._at - self.began_at))
        if len(self._turns) > 200:
            self._turns = list(self._longest().values())
        reactor.callLater(TICK_S, self.tick)

    def _longest(self):
        return {clock: max(self._turns, key=lambda turn: turn[i]) for i, clock in enumerate(self.CLOCKS)}

    def take(self):
        names = (*self.CLOCKS, "after_s")
        taken = {clock: dict(zip(names, turn)) for clock, turn in self._longest().items()}
        self.begin()
        return taken


class Asked(LineOnlyReceiver):
    delimiter = b"\n"

    def lineReceived(self, line):
        self.sendLine(json.dumps(watch.take()).encode())
        self.transport.loseConnection()


settings = app.load_settings_or_exit(os.environ)
writer, threshold, log = app.make_log(settings)
application.setComponent(ILogObserver, TwistedEvents(log))
app.make_service(settings, reactor, writer, threshold, log).setServiceParent(application)

watch = Watch()
reactor.callWhenRunning(watch.tick)
endpoint = UNIXServerEndpoint(reactor, os.environ["CACHESERVICE_WATCH"])
StreamServerEndpointService(endpoint, Factory.forProtocol(Asked)).setServiceParent(application)
