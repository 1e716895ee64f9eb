"""The state of one Redis client, which commands see and change.

The mode of a session determines the commands that may run:

==========  ==============================================================================================
mode        meaning
==========  ==============================================================================================
LOCKED      The client has to send the password first: AUTH or HELLO.
PLAIN       All commands run.
QUEUING     After MULTI: commands are queued until EXEC or DISCARD.
SUBSCRIBED  The client has subscriptions in version 2 of the protocol: only a few commands run.
==========  ==============================================================================================
"""

from __future__ import annotations

import enum

from cacheservice.ports.resp import reply
from cacheservice.ports.resp.server import PASSWORD, Link, Server, Transaction

_MOST_MESSAGES = 1000
"""The most publishes that wait for a subscriber to read."""
_NO_CHANNELS: frozenset[bytes] = frozenset()


class Mode(enum.Enum):
    """The commands that may run; see the docstring of the module."""

    LOCKED = enum.auto()
    PLAIN = enum.auto()
    QUEUING = enum.auto()
    SUBSCRIBED = enum.auto()


LOCKED, PLAIN, QUEUING, SUBSCRIBED = Mode
"""The modes as globals: a look-up in the class would take longer than the comparison."""


class ClientState:
    """The state of one client.

    `in_transaction` is True while a command of a transaction runs. `messages` are those of subscriptions, not yet sent.

    :param number: the id that CLIENT ID returns.
    """

    __slots__ = (
        "channels",
        "id",
        "in_transaction",
        "last_command",
        "library_name",
        "library_version",
        "link",
        "messages",
        "mode",
        "name",
        "protocol",
        "server",
        "transaction",
    )

    def __init__(self, server: Server, number: int, link: Link) -> None:
        self.id = number
        self.server = server
        self.link = link
        self.protocol = 2
        self.name = self.library_name = self.library_version = b""
        self.channels = _NO_CHANNELS
        self.messages: list[bytes] = []
        self.transaction: Transaction | None = None
        self.in_transaction = False
        self.last_command = b""
        self._settle(is_locked=server.password.is_required)

    def _settle(self, *, is_locked: bool = False) -> None:
        """Determine the mode after a change."""
        if is_locked:
            self.mode = LOCKED
        elif self.transaction is not None:
            self.mode = QUEUING
        else:
            self.mode = SUBSCRIBED if self.channels and self.protocol == 2 else PLAIN

    @property
    def is_authenticated(self) -> bool:
        """Whether the client may read."""
        return self.mode is not LOCKED

    def let_in(self, host: str) -> None:
        """Note that the client has sent the correct password."""
        self.server.passwords.accept(host, PASSWORD)
        self._settle()

    def speak(self, protocol: int) -> None:
        """Use version 2 or 3 of the protocol from now on."""
        self.protocol = protocol
        self._settle()

    def set_name(self, name: bytes) -> None:
        self.name = name

    def set_library(self, *, name: bytes | None = None, version: bytes | None = None) -> None:
        """Set what the client reports about its library."""
        if name is not None:
            self.library_name = name
        if version is not None:
            self.library_version = version

    def begin(self) -> None:
        """Begin a transaction."""
        self.transaction = Transaction()
        self._settle()

    def end_transaction(self) -> Transaction | None:
        """End and return the transaction; None if there is none."""
        transaction, self.transaction = self.transaction, None
        if transaction is not None:
            self._settle()
        return transaction

    def subscribe(self, channel: bytes) -> None:
        self.channels |= {channel}
        self.server.subscriptions.add(channel, self)
        self._settle()

    def unsubscribe(self, channel: bytes) -> None:
        if channel in self.channels:
            self.channels -= {channel}
            self.server.subscriptions.remove(channel, self)
            self._settle()

    def push(self, channel: bytes, message: bytes) -> None:
        """Send a message to a subscriber.

        A subscriber that does not read is dropped, as Redis does at its output limit.
        """
        if len(self.messages) >= _MOST_MESSAGES:
            self.link.drop_slow()
            return
        self.messages.append(reply.push([b"message", channel, message], self.protocol))
        self.link.deliver()

    def take_messages(self) -> list[bytes]:
        """Return the messages that are to be sent."""
        messages, self.messages = self.messages, []
        return messages

    def reset(self) -> None:
        """Become as a new session, except for its id and its library."""
        self.leave()
        self.protocol, self.name, self.transaction = 2, b"", None
        self._settle(is_locked=self.server.password.is_required)

    def leave(self) -> None:
        """End all subscriptions."""
        for channel in self.channels:
            self.server.subscriptions.remove(channel, self)
        self.channels = _NO_CHANNELS
