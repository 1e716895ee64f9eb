"""Takes SQL of EXPLAIN and the catalog apart; pure functions of texts."""

from __future__ import annotations

import re
from collections.abc import Iterator

_STRING = r"'(?:[^']|'')*'"
_QUOTED_NAME = r'"(?:[^"]|"")*"'
_DOLLARS = r"(?<![\w$])(\$(?:[^\W\d]\w*)?\$).*?\1"
_STRINGS = re.compile(f"{_QUOTED_NAME}|{_STRING}|{_DOLLARS}", re.DOTALL)
_COMMENTS = re.compile(rf"{_QUOTED_NAME}|{_STRING}|--[^\n]*|/\*.*?\*/", re.DOTALL)


def without_strings(text: str) -> str:
    """Return `text` with empty strings for its string literals.

    Names in quotation marks stay.
    """
    return _STRINGS.sub(lambda match: match[0] if match[0].startswith('"') else "''", text)


def without_comments(text: str) -> str:
    return _COMMENTS.sub(lambda match: match[0] if match[0][0] in "'\"" else " ", text)


def split(text: str, separator: str) -> Iterator[str]:
    """Yield the parts of `text` between separators outside parentheses."""
    begin = place = 0
    while place < len(text):
        if text[place] == "(":
            place = closes_at(text, place)
        elif text[place] in "'\"":
            place = _quoted_to(text, place)
        elif text.startswith(separator, place):
            yield text[begin:place]
            begin = place + len(separator)
        place += 1
    yield text[begin:]


def closes_at(text: str, place: int) -> int:
    """Return the place of the parenthesis that closes the one at `place`.

    It is the end of the text if none does.
    """
    depth = 0
    while place < len(text):
        if text[place] in "'\"":
            place = _quoted_to(text, place)
        elif text[place] in "()":
            depth += 1 if text[place] == "(" else -1
            if depth == 0:
                return place
        place += 1
    return len(text)


def inside(text: str) -> str:
    """Return the text inside parentheses around all of `text`, or `text` without any."""
    while text.startswith("(") and text.endswith(")") and closes_at(text, 0) == len(text) - 1:
        text = text[1:-1]
    return text


def _quoted_to(text: str, place: int) -> int:
    end = text.find(text[place], place + 1)
    return len(text) if end < 0 else end
