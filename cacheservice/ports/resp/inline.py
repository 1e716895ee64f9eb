"""Parses the parts of Redis requests that hiredis does not know: numbers, and inline commands with their quotes."""

from __future__ import annotations

import re

_INT = re.compile(rb"0|-?[1-9][0-9]{0,18}")
_SPACE = b" \t\n\r\v\f"
_ESCAPES = {ord("n"): b"\n", ord("r"): b"\r", ord("t"): b"\t", ord("b"): b"\b", ord("a"): b"\a"}
_HEX = re.compile(rb"[0-9a-fA-F]{2}")


class ProtocolViolation(Exception):
    """The bytes are not a request.

    The message is that of Redis. It is sent before the connection is closed.
    """


def integer(text: bytes) -> int | None:
    """Parse an integer as Redis's string2ll does; None if invalid.

    No plus sign, no leading zeros, no blanks, 64 bits.
    """
    number = int(text) if _INT.fullmatch(text) else None
    return number if number is not None and -(1 << 63) <= number < 1 << 63 else None


def split_arguments(line: bytes) -> list[bytes]:
    """Split an inline command; quotes and escapes as in Redis's sdssplitargs.

    :raises ProtocolViolation: for quotes that are not closed, or not followed by a space.
    """
    arguments: list[bytes] = []
    position, end = 0, len(line)
    while True:
        while position < end and line[position] in _SPACE:
            position += 1
        if position == end:
            return arguments
        word = bytearray()
        while position < end and line[position] not in _SPACE:
            if line[position] in b"\"'":
                position = _quoted(line, position, word)
            else:
                word.append(line[position])
                position += 1
        arguments.append(bytes(word))


def _quoted(line: bytes, position: int, word: bytearray) -> int:
    """Append the quoted part at `position` to `word`; return the position after it."""
    quote, end = line[position], len(line)
    position += 1
    while position < end:
        character = line[position]
        if character == quote:
            position += 1
            if position < end and line[position] not in _SPACE:
                break
            return position
        following = line[position + 1] if position + 1 < end else None
        if quote == ord('"') and character == ord("\\") and following is not None:
            if following == ord("x") and _HEX.match(line, position + 2):
                word.append(int(line[position + 2 : position + 4], 16))
                position += 4
            else:
                word += _ESCAPES.get(following, bytes([following]))
                position += 2
        elif quote == ord("'") and character == ord("\\") and following == ord("'"):
            word.append(following)
            position += 2
        else:
            word.append(character)
            position += 1
    raise ProtocolViolation("Protocol error: unbalanced quotes in request")
