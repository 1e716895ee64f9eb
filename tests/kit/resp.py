"""Requests of Redis clients, and a blocking client that sends them."""

from __future__ import annotations

import socket
from typing import Any

import hiredis

Words = tuple[bytes | str | int, ...]


def encode(*words: bytes | str | int) -> bytes:
    """A request as clients write it."""
    encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)


class Client:
    """A blocking client; errors are values."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._reader = hiredis.Reader(notEnoughData=self)

    def send(self, *words: bytes | str | int) -> None:
        self.socket.sendall(encode(*words))

    def read(self) -> Any:
        """The next reply or push.

        :raises EOFError: at the end.
        """
        while True:
            reply = self._reader.gets()
            if reply is not self:
                return str(reply) if isinstance(reply, hiredis.ReplyError) else reply
            part = self.socket.recv(65_536)
            if not part:
                raise EOFError
            self._reader.feed(part)

    def ask(self, *words: bytes | str | int) -> Any:
        self.send(*words)
        return self.read()

    def ask_all(self, commands: list[Words]) -> list[Any]:
        """One write, all their replies."""
        self.socket.sendall(b"".join(encode(*words) for words in commands))
        return [self.read() for _ in commands]

    def is_closed(self) -> bool:
        """Whether the other side ends the connection, with all that it still sends read."""
        try:
            while self.socket.recv(65_536):
                pass
        except ConnectionError:
            return True
        return True
