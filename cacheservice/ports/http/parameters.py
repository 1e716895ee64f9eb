"""Checks the query parameters of a request."""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from urllib.parse import unquote_to_bytes

from cacheservice.ports.http.problem import Problem

_SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")
_SHOWN_CHARACTERS = 60
MAX_AGE = "max_age"


def check(query: bytes, known: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Return the values by their names.

    :raises Problem: 400 for an unknown name. If it were ignored, a misspelt parameter would silently have no effect.
    """
    given: dict[str, list[str]] = {}
    for part in query.split(b"&"):
        if part:
            name, _, value = (_text(piece) for piece in part.partition(b"="))
            if name not in known:
                raise Problem(400, _unknown(name, known))
            given.setdefault(name, []).append(value)
    return given


def max_age_s(query: bytes) -> float | None:
    """Return the value of max_age; None if absent.

    :raises Problem: 400 if max_age is not a number of seconds or is repeated, and for any other parameter.
    """
    values = check(query, (MAX_AGE,)).get(MAX_AGE)
    if values is None:
        return None
    seconds = float(values[0]) if len(values) == 1 and _SECONDS.fullmatch(values[0]) else math.inf
    if not math.isfinite(seconds):
        raise Problem(400, "max_age must be given once, as a number of seconds that is not negative, such as max_age=5")
    return seconds


def _text(piece: bytes) -> str:
    return unquote_to_bytes(piece).decode("ascii", "replace")


def _unknown(name: str, known: tuple[str, ...]) -> str:
    shown = "".join(character if character.isprintable() else "?" for character in name[:_SHOWN_CHARACTERS])
    problem = f"unknown query parameter '{shown}'"
    if not known:
        return f"{problem}; this path takes none"
    nearest = get_close_matches(name.lower(), known, 1)
    return f"{problem}; did you mean '{nearest[0]}'?" if nearest else f"{problem}; this path takes {', '.join(known)}"
