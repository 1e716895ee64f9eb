"""Checks the query parameters of a request."""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from urllib.parse import unquote_to_bytes

from cacheservice.cache.change_log import Position
from cacheservice.ports.freshness import Wanted
from cacheservice.ports.http.problem import Problem

_SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")
_GENERATION = re.compile(r"[0-9]{1,19}")
_SHOWN_CHARACTERS = 60
MAX_AGE, MIN_GENERATION, AFTER = "max_age", "min_generation", "after"


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


def wanted(query: bytes) -> Wanted | None:
    """Return the snapshot that max_age and min_generation ask for; None if both are absent.

    :raises Problem: 400 if one of them is not a number or is repeated, and for any other parameter.
    """
    given = check(query, (MAX_AGE, MIN_GENERATION))
    return Wanted(_max_age_s(given), _min_generation(given)) if given else None


def after(query: bytes) -> Position | None:
    """Return the position after which changes are wanted; None if absent.

    :raises Problem: 400 if `after` is not a position or is repeated, and for any other parameter.
    """
    values = check(query, (AFTER,)).get(AFTER)
    if values is None:
        return None
    position = Position.parse(values[0]) if len(values) == 1 else None
    if position is None:
        raise Problem(400, "after must be given once, as a generation or the position in an event, such as after=7")
    return position


def _max_age_s(given: dict[str, list[str]]) -> float:
    values = given.get(MAX_AGE)
    if values is None:
        return math.inf
    seconds = float(values[0]) if len(values) == 1 and _SECONDS.fullmatch(values[0]) else math.inf
    if not math.isfinite(seconds):
        raise Problem(400, "max_age must be given once, as a number of seconds that is not negative, such as max_age=5")
    return seconds


def _min_generation(given: dict[str, list[str]]) -> int:
    values = given.get(MIN_GENERATION)
    if values is None:
        return 0
    if len(values) > 1 or not _GENERATION.fullmatch(values[0]):
        raise Problem(400, "min_generation must be given once, as the number of a generation, such as min_generation=7")
    return int(values[0])


def _text(piece: bytes) -> str:
    return unquote_to_bytes(piece).decode("ascii", "replace")


def _unknown(name: str, known: tuple[str, ...]) -> str:
    shown = "".join(character if character.isprintable() else "?" for character in name[:_SHOWN_CHARACTERS])
    problem = f"unknown query parameter '{shown}'"
    if not known:
        return f"{problem}; this path takes none"
    nearest = get_close_matches(name.lower(), known, 1)
    return f"{problem}; did you mean '{nearest[0]}'?" if nearest else f"{problem}; this path takes {', '.join(known)}"
