"""What a key of a row may be, and the errors for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from cacheservice.base.errors import BadResult
from cacheservice.base.text import printable

MAX_KEY_BYTES = 64 * 1024
_SHOWN_BYTES = 100


def refuse_null(first: int, chunk: Sequence[tuple[bytes | None, bytes]]) -> NoReturn:
    """Raise the error for the first NULL in a chunk, which begins with row `first`, counted from 1."""
    number = first + next(number for number, (key, _) in enumerate(chunk) if key is None)
    raise BadResult(f"the key of row {number} is NULL; every row needs a key")


def refuse_repeated(key: bytes) -> NoReturn:
    """Raise the error for a key that has come before."""
    raise BadResult(f"the key {_shown(key)} occurs twice; a key must be unique")


def refuse_length(key: bytes) -> NoReturn:
    """Raise the error for a key over 64 KiB."""
    raise BadResult(f"the key {_shown(key)} is {len(key)} bytes long; at most 64 KiB are allowed")


def _shown(key: bytes) -> str:
    text = printable(key[:_SHOWN_BYTES].decode("utf-8", "replace"))
    return f'"{text}"' if len(key) <= _SHOWN_BYTES else f'"{text}…"'
