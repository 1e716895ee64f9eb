"""The arguments of commands, and replies in slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

from cacheservice.cache.counts import Reads
from cacheservice.ports.resp.inline import integer
from cacheservice.ports.resp.reply import CHUNK_ROWS, CommandError

SYNTAX = "ERR syntax error"
_NOT_AN_INTEGER = "ERR value is not an integer or out of range"
T = TypeVar("T")


def number_in(word: bytes) -> int:
    """Return the integer that a word is.

    :raises CommandError: if it is not an integer of 64 bits.
    """
    number = integer(word)
    if number is None:
        raise CommandError(_NOT_AN_INTEGER)
    return number


def cursor_in(word: bytes) -> int:
    """Return the cursor that a word is.

    :raises CommandError: if it is not an unsigned integer of 64 bits.
    """
    if not word.isdigit() or len(word) > 20 or int(word) >= 1 << 64:
        raise CommandError("ERR invalid cursor")
    return int(word)


def name_in(key: bytes) -> bytes:
    """Return the name of the dataset of a key."""
    return key.partition(b":")[0]


def unknown_subcommand(command: str, word: bytes) -> CommandError:
    """Return the error for a subcommand that does not exist."""
    return CommandError(f"ERR unknown subcommand '{word[:64].decode('utf-8', 'replace')}'. Try {command} HELP.")


def in_slices(header: bytes, items: Sequence[T], some: Callable[[Sequence[T]], bytes]) -> bytes | Iterator[bytes]:
    """Return the header and the encoded items, in one piece if they are few.

    :param some: encodes a slice of the items.
    """
    if len(items) <= CHUNK_ROWS:
        return header + some(items)
    return chain([header], (some(items[start : start + CHUNK_ROWS]) for start in range(0, len(items), CHUNK_ROWS)))


def count_reads(reads: Reads, answers: Sequence[bytes], nil: bytes) -> None:
    """Count answers as hits or misses."""
    missed = answers.count(nil)
    reads.miss(missed)
    reads.hit(len(answers) - missed)
