"""A connection between two processes of one machine, over a unix stream socket.

Each end sends events, calls and frames; `messages` describes their bytes. Messages arrive in the order in which they
were sent, and their handlers are called in that order. A handler that returns a Deferred or a coroutine does not hold
up the messages after it, so replies may arrive in another order than their calls.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias, cast

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from cacheservice.base.errors import CacheServiceError
from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.timers import is_active
from cacheservice.replication.messages import (
    BadMessage,
    Call,
    Event,
    Fields,
    Frames,
    Message,
    MessageTooLarge,
    Plain,
    Reader,
    Reply,
    encode,
)
from cacheservice.replication.outgoing import LinkLost, Outgoing

__all__ = ["CallFailed", "CallTimedOut", "Link", "LinkLost"]

CALL_TIMEOUT_S = 5.0

Handler: TypeAlias = Callable[..., "Plain | Deferred[Plain] | Coroutine[Deferred[Any], Any, Plain]"]
"""Takes the fields of a message as keywords. The value that it returns for an event is ignored."""


class CallFailed(CacheServiceError):
    """The other process refused a call. The message is the reason that it gave."""


class CallTimedOut(CacheServiceError):
    """The other process did not answer a call in time. It may have carried it out."""


class Link(Protocol):
    """One end of a connection between two processes.

    It is lost when the other process ends, and when that sends bytes that are not messages. Once it is lost, events and
    frames are dropped, and calls fail with `LinkLost`.

    :param clock: times the calls.
    :param on_frames: is called with the bytes of each `send_frames` of the other end. It must not raise.
    :param on_lost: is called once, with the reason as text.
    """

    def __init__(
        self,
        clock: Clock,
        log: Log,
        on_frames: Callable[[bytes], object] = lambda data: None,
        on_lost: Callable[[str], object] = lambda reason: None,
    ) -> None:
        self._log = log
        self._on_frames = on_frames
        self._on_lost = on_lost
        self._reader = Reader()
        self._calls = _Calls(clock)
        self._handlers: dict[str, Handler] = {}
        self._outgoing: Outgoing | None = None
        self._broken: str | None = None

    def handle(self, name: str, handler: Handler) -> None:
        """Call `handler` for each event and each call with this name.

        A `CacheServiceError` that it raises is the failure of the call, with its message. Any other exception is a bug:
        it is logged, and the call fails with "an internal error".
        """
        self._handlers[name] = handler

    def send(self, name: str, /, **fields: Plain) -> None:
        """Send an event.

        :raises MessageTooLarge: if it is longer than 16 MiB.
        """
        self._write(Event(name, fields))

    def call(self, name: str, /, timeout_s: float = CALL_TIMEOUT_S, **fields: Plain) -> Deferred[Plain]:
        """Call a handler of the other end, and fire with the value that it returns. Cancelling ignores the reply.

        :raises LinkLost: if the connection ends before the reply.
        :raises CallFailed: if the other end refuses.
        :raises CallTimedOut: after `timeout_s` seconds without a reply.
        :raises MessageTooLarge: if the call is longer than 16 MiB.
        """
        if self._outgoing is None:
            answered: Deferred[Plain] = Deferred()
            answered.errback(LinkLost("the connection to the other process is lost"))
            return answered
        number = self._calls.next_number()
        try:
            self._write(Call(number, name, fields))
        except (MessageTooLarge, TypeError, OverflowError) as error:
            answered = Deferred()
            answered.errback(error)
            return answered
        return self._calls.expect(number, name, timeout_s)

    def send_frames(self, data: bytes) -> None:
        """Send bytes of frames, which arrive in one piece.

        :raises MessageTooLarge: if they are longer than 16 MiB.
        """
        self._write(Frames(data))

    @property
    def unsent_bytes(self) -> int:
        """The bytes that wait to be sent; 0 once the link is lost."""
        return 0 if self._outgoing is None else self._outgoing.unsent_bytes

    def wait_until_sent(self) -> Deferred[None]:
        """Fire when less than 1 MiB is unsent.

        :raises LinkLost: if the link is lost before, or was.
        """
        if self._outgoing is None:
            lost: Deferred[None] = Deferred()
            lost.errback(LinkLost("the connection to the other process is lost"))
            return lost
        return self._outgoing.wait_until_sent()

    def finish(self) -> None:
        """Send the messages that wait, then close the link."""
        if self._outgoing is not None:
            self._outgoing.finish()

    def lose(self) -> None:
        """Close the link now; messages that wait are dropped."""
        if self._outgoing is not None:
            cast("Any", self.transport).abortConnection()

    def connectionMade(self) -> None:
        self._outgoing = Outgoing(cast("Any", self.transport))

    def dataReceived(self, data: bytes) -> None:
        if self._broken is not None:
            return
        try:
            messages = self._reader.feed(data)
        except BadMessage as error:
            self._broken = str(error)
            self._log.error("link_broken", error=self._broken)
            cast("Any", self.transport).abortConnection()
            return
        for message in messages:
            self._received(message)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        outgoing, self._outgoing = self._outgoing, None
        if outgoing is not None:
            outgoing.lost()
        self._calls.lost()
        self._on_lost(self._broken or reason.getErrorMessage())

    def _write(self, message: Message) -> None:
        if self._outgoing is not None:
            self._outgoing.write(encode(message))

    def _received(self, message: Message) -> None:
        if isinstance(message, Frames):
            self._on_frames(message.data)
        elif isinstance(message, Reply):
            self._calls.answered(message)
        elif isinstance(message, Call):
            handled = self._handled(message.name, message.fields)
            handled.addCallback(self._reply, message.number)
            handled.addErrback(self._refuse, message.number)
        else:
            self._handled(message.name, message.fields).addErrback(self._log_failure)

    def _handled(self, name: str, fields: Fields) -> Deferred[Plain]:
        handler = self._handlers.get(name)
        if handler is None:
            failed: Deferred[Plain] = Deferred()
            failed.errback(CallFailed(f"the other process does not handle '{name}'"))
            return failed
        handled: Deferred[Plain] = maybeDeferred(cast("Callable[..., Plain]", handler), **fields)
        return handled

    def _reply(self, value: Plain, number: int) -> None:
        self._write(Reply(number, True, value))

    def _refuse(self, failure: Failure, number: int) -> None:
        if failure.check(CacheServiceError):
            self._write(Reply(number, False, failure.getErrorMessage()))
        else:
            self._log_failure(failure)
            self._write(Reply(number, False, "an internal error"))

    def _log_failure(self, failure: Failure) -> None:
        self._log.error("internal_error", error=failure.getErrorMessage(), traceback=failure.getTraceback())


class _Calls:
    """The calls of one end that have not been answered."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last_number = 0
        self._expected: dict[int, Deferred[Plain]] = {}

    def next_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def expect(self, number: int, name: str, timeout_s: float) -> Deferred[Plain]:
        answered: Deferred[Plain] = Deferred(lambda _: self._forget(number))
        self._expected[number] = answered

        def give_up() -> None:
            self._expected.pop(number).errback(
                CallTimedOut(f"the other process did not answer '{name}' within {timeout_s:g} s")
            )

        timer = self._clock.callLater(timeout_s, give_up)

        def end(result: Plain | Failure) -> Plain | Failure:
            if is_active(timer):
                timer.cancel()
            return result

        return answered.addBoth(end)

    def _forget(self, number: int) -> None:
        self._expected.pop(number, None)

    def answered(self, reply: Reply) -> None:
        answered = self._expected.pop(reply.number, None)
        if answered is None:
            return  # too late, or cancelled
        if reply.succeeded:
            answered.callback(reply.value)
        else:
            answered.errback(CallFailed(str(reply.value)))

    def lost(self) -> None:
        expected, self._expected = self._expected, {}
        for each in expected.values():
            each.errback(LinkLost("the connection to the other process was lost before it answered"))
