"""A connection to the RESP port that subscribes to publishes."""

from __future__ import annotations

import re
import select
from collections.abc import Collection

import hiredis

from cacheservice.base.errors import Refused
from cacheservice.cli.client import Address, no_answer_from

_TIMEOUT_S = 5.0


class Subscription:
    """Receives the messages of the datasets to which it has subscribed."""

    def __init__(self, address: Address, password: str) -> None:
        """Connect to the port.

        :raises NoAnswer: if the port is closed.
        :raises Refused: if it refuses the password.
        """
        self.address = address
        self._names: set[str] = set()
        self._reader = hiredis.Reader()
        self._messages: list[bytes] = []
        with no_answer_from(address):
            self._socket = address.connect(_TIMEOUT_S)
        try:
            if password:
                self._command("AUTH", password)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def wait(self, seconds: float) -> bool:
        """Wait for data; return whether any have arrived."""
        return bool(select.select([self._socket], [], [], seconds)[0])

    def pid(self) -> int | None:
        """Return the process ID of the service behind the port."""
        reply = self._command("INFO", "server")
        found = re.search(rb"process_id:(\d+)", reply) if isinstance(reply, bytes) else None
        return int(found[1]) if found else None

    def subscribe(self, names: Collection[str]) -> bool:
        """Subscribe to further datasets; return True if any of them is new.

        :raises CacheServiceError: if the port refuses, or the connection is closed.
        """
        new = [name for name in names if name not in self._names]
        if new:
            self._send("SUBSCRIBE", *(f"cache:{name}" for name in new))
            for _ in new:
                self._reply()
            self._names.update(new)
        return bool(new)

    def messages(self) -> list[bytes]:
        """Return the messages that have arrived, without waiting.

        :raises NoAnswer: if the connection has ended.
        """
        with no_answer_from(self.address):
            while self.wait(0):
                self._receive()
        while (reply := self._next()) is not False:
            self._take(reply)
        messages, self._messages = self._messages, []
        return messages

    def _command(self, *words: str) -> object:
        self._send(*words)
        return self._reply()

    def _send(self, *words: str) -> None:
        with no_answer_from(self.address):
            self._socket.sendall(hiredis.pack_command(words))  # type: ignore[arg-type]  # declared for one word

    def _reply(self) -> object:
        """Return the next reply that is not a message."""
        while True:
            while (reply := self._next()) is False:
                with no_answer_from(self.address):
                    self._receive()
            if isinstance(reply, hiredis.ReplyError):
                raise Refused(str(reply))
            if not self._take(reply):
                return reply

    def _next(self) -> object:
        """Return the next complete reply; False if there is none."""
        try:
            return self._reader.gets()
        except hiredis.ProtocolError as error:
            raise Refused("the server does not speak the Redis protocol") from error

    def _receive(self) -> None:
        received = self._socket.recv(65536)
        if not received:
            raise ConnectionResetError("the connection was closed")
        self._reader.feed(received)

    def _take(self, reply: object) -> bool:
        """Keep a reply if it is a message; return whether it is."""
        match reply:
            case [b"message", _, bytes(text)]:
                self._messages.append(text)
                return True
        return False
