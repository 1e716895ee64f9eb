"""Canaries: notifications that the service sends to itself, to prove that notifications arrive. No I/O."""

from __future__ import annotations

import secrets

from cacheservice.config import OWN_CHANNEL

_PREFIX = "canary "

# The commit of a notification writes to the WAL. If it waited there for a synchronous standby that is gone, it would
# wait forever, even if the client no longer listens, and keep every other NOTIFY waiting.
_SEND_SQL = "SELECT set_config('synchronous_commit', 'off', true), pg_notify('{channel}', '{payload}')"


class Canaries:
    """The canaries of one listener, numbered.

    They use the service's own channel, because other programs that listen to the datasets' channels would receive them,
    too. A token identifies the canaries of this listener, because several services may share a database.

    `sent` is the number of canaries that were sent.
    """

    def __init__(self) -> None:
        self._token = f"{_PREFIX}{secrets.token_hex(8)}"
        self._returned = 0
        self.sent = 0

    def next_sql(self) -> str:
        """Return the statement that sends the next canary."""
        self.sent += 1
        return _SEND_SQL.format(channel=OWN_CHANNEL, payload=self._newest())

    def is_back(self) -> bool:
        """Return whether the newest canary has been received."""
        return self._returned == self.sent

    def received(self, channel: str, payload: str) -> bool:
        """Return whether a notification is a canary of this listener or another one; note that it was received."""
        if channel != OWN_CHANNEL or not payload.startswith(_PREFIX):
            return False
        if payload == self._newest():
            self._returned = self.sent
        return True

    def _newest(self) -> str:
        return f"{self._token} {self.sent}"
