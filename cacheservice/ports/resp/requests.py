"""Parses requests of the Redis protocol from the bytes of a connection.

hiredis parses the requests of real clients, complete arrays of bulk strings, at C speed. This module parses the rest by
the rules of Redis 7's networking.c: inline commands, which hiredis does not know; malformed requests, which it treats
differently from a Redis server; and requests that are incomplete. So equal bytes get the same class of answer however
they are split.
"""

from __future__ import annotations

import enum
import os
import re
from itertools import islice

import hiredis

from cacheservice.ports.resp.inline import ProtocolViolation, integer, split_arguments

MAX_INLINE_BYTES = 64 * 1024
MAX_ARGUMENTS = 999_999
MAX_ARGUMENT_BYTES = 512 * 1024 * 1024
MAX_REQUEST_BYTES = 64 * 1024 * 1024
"""The most bytes of an incomplete request; more than any read of a cache needs."""
MAX_ARGUMENTS_BEFORE_AUTH = 10
MAX_ARGUMENT_BYTES_BEFORE_AUTH = 16 * 1024

# hiredis allocates memory for the count in a header, and frees it by element: it must not get a count of a million.
_HUGE_ARRAY = re.compile(rb"\*[0-9]{7}")
_HUGE_AGGREGATE = re.compile(rb"[>~|%][0-9]{7}")

_DOUBTFUL = (b"+", b"=", b"(", b"~", b">", b"|", b"#")
"""The first bytes of simple strings, verbatim strings, big numbers, sets, pushes, attributes and booleans."""

_SIZES = tuple(b"$%d" % size_bytes for size_bytes in range(1024))

_NOT_FOR_HIREDIS = (hiredis.ProtocolError, TypeError)
"""hiredis raises the latter for a map whose key is an array."""

_MARK = os.urandom(8).hex().encode()
_MARK_LINE = b"+" + _MARK + b"\r\n"


class _By(enum.Enum):
    """The parser of the bytes in the buffer."""

    HIREDIS = enum.auto()
    HERE_ONCE = enum.auto()
    """This module, to the end of one request: hiredis cannot begin within a request."""
    HERE = enum.auto()
    """This module, until the buffer is empty: input that hiredis does not know seldom comes alone."""


_HIREDIS, _HERE_ONCE, _HERE = _By


class RequestParser:
    """Takes bytes and returns commands: lists of at least one bytes object.

    `exhausted` is True if more bytes must be fed before more commands can be taken. `authenticated` is False while the
    limits for clients without a password apply.
    """

    __slots__ = (
        "_arguments",
        "_arguments_bytes",
        "_batch",
        "_buffer",
        "_by",
        "_doubtful",
        "_fast",
        "_given",
        "_single",
        "_verified_bytes",
        "_violation",
        "_wanted_arguments",
        "authenticated",
        "exhausted",
    )

    def __init__(self) -> None:
        self.authenticated = True
        self.exhausted = True
        self._fast = hiredis.Reader()
        self._single: list[bytes] | None = None
        # The bytes fed to hiredis, until it has returned all of their commands, and the number that it has returned.
        self._batch = b""
        self._given = 0
        self._doubtful = False
        self._verified_bytes = 0
        # The bytes after them.
        self._buffer = bytearray()
        self._by = _HIREDIS
        self._wanted_arguments = 0
        self._arguments: list[bytes] = []
        self._arguments_bytes = 0
        self._violation: ProtocolViolation | None = None

    def set_authenticated(self, authenticated: bool) -> None:
        """Apply the limits for clients that have sent the password, or those before AUTH."""
        self.authenticated = authenticated

    @property
    def is_within_request(self) -> bool:
        """True if the parser is in the middle of a request."""
        return bool(self._buffer or self._wanted_arguments)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the connection.

        :raises ProtocolViolation: if a request does not end within 64 MiB.
        """
        if self.exhausted and self._by is _HIREDIS and self.authenticated:
            self._single = _two_words(data)
            if self._single is not None:
                self.exhausted = False
                return
            if _is_plain(data):
                self.exhausted = False
                self._feed_fast(data)
                return
        self._buffer += data
        if len(self._buffer) + self._arguments_bytes > MAX_REQUEST_BYTES:
            raise ProtocolViolation("Protocol error: too big request")

    def take(self, most: int) -> list[list[bytes]]:
        """Return the next commands, at most `most`.

        Before AUTH it returns one at a time, because AUTH changes the limits for the commands after it.

        :raises ProtocolViolation: if the next bytes are not a command; nothing after them can be parsed.
        """
        if self._single is not None:
            single, self._single, self.exhausted = self._single, None, True
            return [single]
        if self._violation is not None:
            raise self._violation
        self.exhausted = False
        commands: list[list[bytes]] = []
        if self._batch:
            known = True
            try:
                commands += islice(iter(self._fast.gets, False), most)
            except _NOT_FOR_HIREDIS:
                known = False  # the list contains the commands before the error
            good = _count_good(commands)
            if self._doubtful:
                good = self._verify(commands[:good])
                known = known and (good == most or self._verified_bytes == len(self._batch))
            if good < len(commands) or not known:
                del commands[good:]
                self._give_back(good, incomplete=False)
            elif good < most and _is_between(self._fast):
                self._batch, self._given = b"", -good
            elif good < most:
                self._give_back(good, incomplete=True)
        self._given += len(commands)
        if not self._batch and len(commands) < most:
            if self._buffer:
                self._take_here(commands, most if self.authenticated else 1)
            else:
                self.exhausted = True
        return commands

    def _feed_fast(self, data: bytes) -> None:
        self._batch = data
        self._doubtful = _is_doubtful(data)
        self._verified_bytes = 0
        self._fast.feed(data)

    def _verify(self, commands: list[list[bytes]]) -> int:
        """Return the number of leading commands that match the batch byte by byte."""
        for number, command in enumerate(commands):
            written = b"*%d\r\n%b" % (
                len(command),
                b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in command]),
            )
            if not self._batch.startswith(written, self._verified_bytes):
                return number
            self._verified_bytes += len(written)
        return len(commands)

    def _give_back(self, taken: int, *, incomplete: bool) -> None:
        """Take the unreturned bytes from hiredis, to parse them here.

        :param taken: the number of commands taken since `_given` was last updated.
        """
        count = self._given + taken
        start = (incomplete and _start_of_last(self._batch, count)) or _start_after(self._batch, count)
        self._buffer[:0] = self._batch[start:]
        self._fast = hiredis.Reader()
        self._batch, self._given = b"", -taken
        # Input that hiredis cannot parse seldom comes alone, and to alternate between the parsers is quadratic.
        self._by = _HERE_ONCE if incomplete else _HERE

    def _take_here(self, commands: list[list[bytes]], most: int) -> None:
        """Parse commands without hiredis, until hiredis can take the rest."""
        while self._buffer and len(commands) < most:
            if self._by is _HIREDIS:
                data = bytes(self._buffer)
                if self.authenticated and _is_plain(data):
                    self._buffer.clear()
                    self._feed_fast(data)
                    return
                self._by = _HERE
            try:
                command = self._next_here()
            except ProtocolViolation as violation:
                # It is raised when all commands before it have been taken.
                self._violation = violation
                if commands:
                    return
                raise
            if command is None:
                break
            if command:
                commands.append(command)
            if self._by is _HERE_ONCE or not self._buffer:
                self._by = _HIREDIS
        self.exhausted = not self._buffer or (self._by is not _HIREDIS and len(commands) < most)

    def _next_here(self) -> list[bytes] | None:
        """Return the next command: empty for an empty request, None if incomplete."""
        if self._wanted_arguments or self._buffer[0] == 42:
            return self._next_multibulk(self._buffer)
        return self._next_inline(self._buffer)

    def _next_inline(self, buffer: bytearray) -> list[bytes] | None:
        end = buffer.find(b"\n")
        if end < 0:
            if len(buffer) > MAX_INLINE_BYTES:
                raise ProtocolViolation("Protocol error: too big inline request")
            return None
        line = bytes(buffer[:end])
        del buffer[: end + 1]
        return split_arguments(line.removesuffix(b"\r"))

    def _next_multibulk(self, buffer: bytearray) -> list[bytes] | None:
        if not self._wanted_arguments:
            header = self._header(buffer, "too big mbulk count string")
            if header is None:
                return None
            count = integer(header)
            if count is None or count > MAX_ARGUMENTS:
                raise ProtocolViolation("Protocol error: invalid multibulk length")
            if count > MAX_ARGUMENTS_BEFORE_AUTH and not self.authenticated:
                raise ProtocolViolation("Protocol error: unauthenticated multibulk length")
            if count <= 0:
                return []
            self._wanted_arguments = count
        while self._wanted_arguments:
            argument = self._next_bulk(buffer)
            if argument is None:
                return None
            self._arguments.append(argument)
            self._arguments_bytes += len(argument)
            self._wanted_arguments -= 1
        command, self._arguments, self._arguments_bytes = self._arguments, [], 0
        return command

    def _next_bulk(self, buffer: bytearray) -> bytes | None:
        end = buffer.find(b"\r")
        if end < 0:
            if len(buffer) > MAX_INLINE_BYTES:
                raise ProtocolViolation("Protocol error: too big bulk count string")
            return None
        if end + 2 > len(buffer):
            return None
        if buffer[0] != 36:
            raise ProtocolViolation(f"Protocol error: expected '$', got '{chr(buffer[0])}'")
        length = integer(bytes(buffer[1:end]))
        if length is None or not 0 <= length <= MAX_ARGUMENT_BYTES:
            raise ProtocolViolation("Protocol error: invalid bulk length")
        if length > MAX_ARGUMENT_BYTES_BEFORE_AUTH and not self.authenticated:
            raise ProtocolViolation("Protocol error: unauthenticated bulk length")
        start = end + 2
        if len(buffer) < start + length + 2:
            return None
        argument = bytes(buffer[start : start + length])
        del buffer[: start + length + 2]
        return argument

    def _header(self, buffer: bytearray, too_big: str) -> bytes | None:
        """Remove and return the line after the type's byte; None if incomplete."""
        end = buffer.find(b"\r")
        if end < 0:
            if len(buffer) > MAX_INLINE_BYTES:
                raise ProtocolViolation(f"Protocol error: {too_big}")
            return None
        if end + 2 > len(buffer):
            return None
        header = bytes(buffer[1:end])
        del buffer[: end + 2]
        return header


def _two_words(data: bytes) -> list[bytes] | None:
    """Return the command if `data` is exactly one of two words; otherwise None.

    Most requests of clients that wait for each reply have this form. The function takes a third of hiredis's time
    (measured).
    """
    parts = data.split(b"\r\n", 5)
    if len(parts) == 6:
        count, name_size, name, size, argument, rest = parts
        short = count == b"*2" and not rest and len(name) < 1024 and len(argument) < 1024
        if short and name_size == _SIZES[len(name)] and size == _SIZES[len(argument)]:
            return [name, argument]
    return None


def _is_plain(data: bytes) -> bool:
    """Return True if hiredis may parse `data`.

    It begins with an array, and contains no count for which hiredis would allocate much memory. RESP 3 has several
    types with counts. A match within a word only costs time.
    """
    return (
        data[0] == 42
        and not _HUGE_ARRAY.search(data)
        # A search for single bytes is ten times as fast.
        and not ((b">" in data or b"~" in data or b"|" in data or b"%" in data) and _HUGE_AGGREGATE.search(data))
    )


def _is_doubtful(data: bytes) -> bool:
    """Return True if `data` may contain a type that Redis refuses.

    hiredis takes such a type for a bulk string, or skips it. Only the first byte of a type matters, but only hiredis
    knows its position, because it does not check the two bytes after a word.
    """
    return any(mark in data for mark in _DOUBTFUL)


def _count_good(commands: list[list[bytes]]) -> int:
    """Return the number of leading commands that are arrays of bulk strings."""
    for number, command in enumerate(commands):
        if command.__class__ is not list or not command:
            return number
        for argument in command:
            if argument.__class__ is not bytes:
                return number
    return len(commands)


def _is_between(reader: hiredis.Reader) -> bool:
    """Return True if an exhausted reader is between two requests.

    Only then can it be used again. hiredis does not expose this, so the reader is fed a line that no client can know:
    between two requests it returns that line.
    """
    if reader.has_data():
        return False
    reader.feed(_MARK_LINE)
    try:
        return bool(reader.gets() == _MARK)
    except _NOT_FOR_HIREDIS:
        return False


def _start_of_last(batch: bytes, count: int) -> int:
    """Return the start of the last, incomplete request, after `count` others.

    Return 0 if a cheap search does not find it.
    """
    position = batch.rfind(b"\r\n*") + 2
    reader = hiredis.Reader()
    reader.feed(batch[:position])
    if all(reader.gets() for _ in range(count)) and reader.gets() is False and _is_between(reader):
        return position
    return 0


def _start_after(batch: bytes, count: int) -> int:
    """Return the end of the first `count` requests, which are well-formed arrays."""
    position = 0
    for _ in range(count):
        end = batch.index(b"\r", position)
        arguments = int(batch[position + 1 : end])
        position = end + 2
        for _ in range(arguments):
            end = batch.index(b"\r", position)
            position = end + 2 + int(batch[position + 1 : end]) + 2
    return position
