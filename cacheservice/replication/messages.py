"""The messages of a link as bytes: encodes them, and finds them in a stream of bytes.

A message is one byte for its kind, the length of its payload in 4 bytes (big-endian), and the payload:

- `F`: bytes of frames.
- `E`: an event, msgpack of ``[name, {fields}]``.
- `C`: a call, msgpack of ``[number, name, {fields}]``.
- `R`: the reply to a call, msgpack of ``[number, true, value]`` or ``[number, false, message]``.

This module has no I/O; `link` has the socket.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, cast

import msgpack  # type: ignore[import-untyped]  # ships no type information

from cacheservice.base.errors import CacheServiceError

MAX_PAYLOAD_BYTES = 16 << 20
"""The longest payload. A larger length means that the other end does not speak this protocol."""

Plain: TypeAlias = "bool | int | float | str | bytes | Sequence[Plain] | Mapping[str, Plain] | None"
"""A value that a message can carry. Integers have at most 64 bits. Sequences arrive as lists, mappings as dicts."""
Fields: TypeAlias = Mapping[str, Plain]

_HEAD = struct.Struct(">cI")


class BadMessage(CacheServiceError):
    """The other end of a link sent bytes that are not a message. The link is closed."""


class MessageTooLarge(CacheServiceError):
    """A message is longer than a link carries. Send it in pieces."""


class Frames(NamedTuple):
    """Bytes of frames, which the link does not interpret. They arrive as they were sent, in one piece."""

    data: bytes


class Event(NamedTuple):
    """A message without a reply."""

    name: str
    fields: Fields


class Call(NamedTuple):
    """A message that asks for a reply. Each end numbers its own calls."""

    number: int
    name: str
    fields: Fields


class Reply(NamedTuple):
    """The reply to the call with this number: its value, or the message of its failure as text."""

    number: int
    succeeded: bool
    value: Plain


Message: TypeAlias = Frames | Event | Call | Reply


def encode(message: Message) -> bytes:
    """Return the bytes of one message.

    :raises MessageTooLarge: if its payload is longer than 16 MiB.
    :raises TypeError: if a field is not a plain value.
    :raises OverflowError: if an integer has more than 64 bits.
    """
    if isinstance(message, Frames):
        payload, kind = message.data, b"F"
    else:
        kind = b"E" if isinstance(message, Event) else b"C" if isinstance(message, Call) else b"R"
        # Names of files may contain bytes that are not UTF-8, which Python keeps as surrogates.
        payload = msgpack.packb(list(message), unicode_errors="surrogatepass")
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise MessageTooLarge(
            f"a message of {len(payload)} bytes does not fit into a link, which carries {MAX_PAYLOAD_BYTES}"
        )
    return _HEAD.pack(kind, len(payload)) + payload


class Reader:
    """Finds the messages in a stream of bytes that arrives in pieces of any size."""

    def __init__(self) -> None:
        self._unread = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that `data` completes, in their order.

        :raises BadMessage: if the stream is not of this protocol. The messages of `data` before the bad one are lost,
            and the reader cannot be used any more.
        """
        unread = self._unread
        unread += data
        messages: list[Message] = []
        place = 0
        while len(unread) - place >= _HEAD.size:
            kind, length = _HEAD.unpack_from(unread, place)
            if kind not in _DECODERS or length > MAX_PAYLOAD_BYTES:
                raise BadMessage(f"the other end sent a message of kind {kind!r} with {length} bytes")
            end = place + _HEAD.size + length
            if len(unread) < end:
                break
            messages.append(_DECODERS[kind](bytes(memoryview(unread)[place + _HEAD.size : end])))
            place = end
        del unread[:place]
        return messages


def _event(payload: bytes) -> Event:
    name, fields = _unpacked(payload, 2)
    return Event(_name(name), _fields(fields))


def _call(payload: bytes) -> Call:
    number, name, fields = _unpacked(payload, 3)
    return Call(_number(number), _name(name), _fields(fields))


def _reply(payload: bytes) -> Reply:
    number, succeeded, value = _unpacked(payload, 3)
    if not isinstance(succeeded, bool) or not (succeeded or isinstance(value, str)):
        raise BadMessage("the other end sent a reply that is neither a value nor a failure")
    return Reply(_number(number), succeeded, value)


def _unpacked(payload: bytes, length: int) -> list[Plain]:
    try:
        parts = msgpack.unpackb(payload, unicode_errors="surrogatepass")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BadMessage(f"the other end sent a message that is not msgpack: {error}") from error
    if not isinstance(parts, list) or len(parts) != length:
        raise BadMessage(f"the other end sent a message that is not a list of {length}")
    return cast("list[Plain]", parts)


def _name(value: Plain) -> str:
    if not isinstance(value, str):
        raise BadMessage("the other end sent a message whose name is not text")
    return value


def _number(value: Plain) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadMessage("the other end sent a call whose number is not an integer")
    return value


def _fields(value: Plain) -> Fields:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise BadMessage("the other end sent a message whose fields are not a table")
    return value


_DECODERS: Mapping[bytes, Callable[[bytes], Message]] = {b"F": Frames, b"E": _event, b"C": _call, b"R": _reply}
