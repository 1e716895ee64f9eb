"""The query of a request's target: what it may hold, and what is said of the rest."""

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
    """The values by their names.

    :raises Problem: 400 for a name that is not known: misspelt, it would be without effect in silence.
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
    """:raises Problem: 400 for a max_age that is not a number of seconds, for two, and for another parameter."""
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
