"""Finds the end of a query's text by the rules of PostgreSQL's own scanner.

It knows comments, quotes and semicolons. The service puts queries into subqueries, where a final semicolon is a syntax
error, and changes nothing else in them. To find that semicolon, this module recognizes all tokens that may contain one
(PostgreSQL's src/backend/parser/scan.l): `--` and nested `/* */`, '…' and E'…' with its continuations, "…", and
$tag$…$tag$. No other text is a comment: `#` is the operator XOR. `standard_conforming_strings` is on, because the
reading transaction sets it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

_LETTER = r"A-Za-z_\u0080-\U0010ffff"
_TOKEN = re.compile(
    rf"""
      (?P<space>  [ \t\n\r\f\v]+ | --[^\n\r]* )
    | (?P<comment> /\* )
    | (?P<escaped> [eE]' )
    | (?P<single> (?: [uU]& )? ' )
    | (?P<double> (?: [uU]& )? " )
    | (?P<dollar> \$ (?: [{_LETTER}] [{_LETTER}0-9]* )? \$ )
    | (?P<word> [{_LETTER}] [{_LETTER}0-9$]* )
    | (?P<semicolon> ; )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_ENDS = {
    "escaped": re.compile(r"(?:[^'\\]|\\.|'')*+'", re.DOTALL),
    "single": re.compile(r"(?:[^']|'')*+'"),
    "double": re.compile(r'(?:[^"]|"")*+"'),
}
_CONTINUED = re.compile(r"[ \t\f\v]*(?:--[^\n\r]*)?[\n\r](?:[ \t\n\r\f\v]|--[^\n\r]*[\n\r])*+'")
"""From the end of a string to its continuation on another line, where backslashes keep their meaning."""
_COMMENT_MARK = re.compile(r"/\*|\*/")


class _Token(NamedTuple):
    kind: str
    start: int
    text: str


class _Unclosed(ValueError):
    def __init__(self, opening: str, start: int) -> None:
        super().__init__(opening)
        self.opening = opening
        self.start = start


@lru_cache(maxsize=1024)
def without_semicolon(query: str) -> str:
    """Return `query` without its final semicolons, so that it fits in parentheses.

    All other text stays unchanged.
    """
    last: list[int] = []
    for token in _tokens(query):
        if token.kind == "semicolon":
            last.append(token.start)
        elif token.kind not in ("space", "comment"):
            last.clear()
    for place in reversed(last):
        query = query[:place] + query[place + 1 :]
    return query


def closed(query: str) -> str:
    """Return `query` if it is closed: text around it cannot change its meaning.

    :raises ValueError: if a comment, a quote or a parenthesis is left open, or if a parenthesis is closed that the
        query did not open.
    """
    opened: list[int] = []
    try:
        for token in _tokens(query):
            if token.text == "(":
                opened.append(token.start)
            elif token.text == ")" and opened:
                opened.pop()
            elif token.text == ")":
                raise ValueError(f"must open what the ) of line {_line(query, token.start)} closes; or remove it")
    except _Unclosed as unclosed:
        line, opening = _line(query, unclosed.start), unclosed.opening
        what = "comment" if opening == "/*" else "quote"
        end = {"/*": "*/"}.get(opening, opening.lstrip("eEuU&"))
        raise ValueError(f"must close the {what} that {opening} opens in line {line}; end it with {end}") from None
    if opened:
        raise ValueError(f"must close the ( of line {_line(query, opened[-1])}; end it with )")
    return query


def _line(query: str, place: int) -> int:
    return query.count("\n", 0, place) + 1


def _tokens(query: str) -> Iterator[_Token]:
    """Yield the tokens of `query`.

    :raises _Unclosed: for a comment or quote without an end.
    """
    place = 0
    while found := _TOKEN.match(query, place):
        kind = found.lastgroup or ""
        end = found.end()
        if kind == "comment":
            end = _end_of_comment(query, place)
        elif kind == "dollar":
            end = query.find(found[0], end) + len(found[0])
            if end < found.end() + len(found[0]):
                raise _Unclosed(found[0], place)
        elif kind in _ENDS:
            end = _end_of_quote(query, kind, found)
        yield _Token(kind, place, query[place:end])
        place = end


def _end_of_comment(query: str, start: int) -> int:
    depth, place = 1, start + 2
    while depth:
        mark = _COMMENT_MARK.search(query, place)
        if mark is None:
            raise _Unclosed("/*", start)
        depth += 1 if mark[0] == "/*" else -1
        place = mark.end()
    return place


def _end_of_quote(query: str, kind: str, opening: re.Match[str]) -> int:
    place = opening.end()
    while True:
        end = _ENDS[kind].match(query, place)
        if end is None:
            raise _Unclosed(opening[0], opening.start())
        place = end.end()
        continued = _CONTINUED.match(query, place) if kind == "escaped" else None
        if continued is None:
            return place
        place = continued.end()
