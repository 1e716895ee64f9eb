"""Encodes replies of the Redis protocol, versions 2 and 3.

The specification is redis.io/docs/latest/develop/reference/protocol-spec.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain
from typing import TypeAlias

from cacheservice.cache.framing import bulk

OK = b"+OK\r\n"
PONG = b"+PONG\r\n"
QUEUED = b"+QUEUED\r\n"
NIL = {2: b"$-1\r\n", 3: b"_\r\n"}

CHUNK_ROWS = 256
"""About 64 KiB of ordinary rows, encoded in 0.2 ms."""


class CommandError(Exception):
    """A command cannot be answered.

    The message is sent unchanged; its first word is the error's code.
    """


class Status(str):
    """A word of the protocol, sent as a simple string."""

    __slots__ = ()


Value: TypeAlias = "bool | int | float | str | bytes | Sequence[Value] | Set[Status] | Mapping[str, Value] | None"
"""A nested value of a reply."""


def error(message: str) -> bytes:
    """Encode an error reply, in one line."""
    return b"-%b\r\n" % " ".join(message.split()).encode("utf-8", "replace")


def integer(value: int) -> bytes:
    return b":%d\r\n" % value


def array_header(length: int) -> bytes:
    return b"*%d\r\n" % length


def map_header(pairs: int, protocol: int) -> bytes:
    """Encode the header of a map; in version 2 an array of keys and values in turn."""
    return b"%%%d\r\n" % pairs if protocol == 3 else b"*%d\r\n" % (2 * pairs)


def encode(value: Value, protocol: int) -> bytes:
    """Encode a nested value. The members of a set are sorted, so that all processes send the same bytes."""
    match value:
        case None:
            return NIL[protocol]
        case bool():
            return (b"#t\r\n" if value else b"#f\r\n") if protocol == 3 else integer(value)
        case int():
            return integer(value)
        case float():
            text = f"{value:.17g}" if value != round(value, 6) else f"{value:.6f}".rstrip("0").rstrip(".")
            return b",%b\r\n" % text.encode() if protocol == 3 else bulk(text.encode())
        case Status():
            return b"+%b\r\n" % value.encode()
        case str():
            return bulk(value.encode())
        case bytes():
            return bulk(value)
        case Mapping():
            items = chain.from_iterable(value.items())
            return map_header(len(value), protocol) + b"".join(encode(item, protocol) for item in items)
        case Set():
            header = b"~%d\r\n" % len(value) if protocol == 3 else array_header(len(value))
            return header + b"".join(encode(item, protocol) for item in sorted(value))
        case Sequence():
            return array_header(len(value)) + b"".join(encode(item, protocol) for item in value)
    raise TypeError(f"no reply is made of {type(value).__name__}")


def push(values: Sequence[Value], protocol: int) -> bytes:
    """Encode a message without a command: a push in version 3, an array in 2."""
    header = b">%d\r\n" % len(values) if protocol == 3 else array_header(len(values))
    return header + b"".join(encode(value, protocol) for value in values)


def pairs(slices: Iterable[tuple[list[bytes], list[bytes]]]) -> Iterator[bytes]:
    """Yield keys and documents in turn, joined for each slice; see `Rows.slices`."""
    for keys, documents in slices:
        yield b"".join(
            [b"$%d\r\n%b\r\n%b" % (len(key), key, ready) for key, ready in zip(keys, documents, strict=True)]
        )
