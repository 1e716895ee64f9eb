"""Adds the next step to tomllib's errors: the place, the cause and the fix, in one line."""

from __future__ import annotations

import re
import tomllib

_FIXES = (
    (r"Cannot declare .* twice", "write this table once, with all of its keys, or give one of the two another name"),
    (r"Cannot overwrite a value", "a key is set twice; remove one of the two"),
    (r"Cannot", "a table in braces cannot be extended later; add its keys inside the braces"),
    (r"Expected '='", "write it as key = value"),
    (r"Unclosed array", "close the list with ]"),
    (r"Unclosed inline table", "close the table with }, on the line on which it begins"),
    (r"Expected '\]+' at the end", "close the table's name with ], as in [datasets.products]"),
    (r"Unescaped", "write \\\\ for a backslash, or use single quotes, in which a backslash stands for itself"),
    (r"Expected newline", "write one key on a line; text needs quotes"),
    (r"Invalid value", 'write text in quotes; numbers, true and false without; a list as ["a", "b"]'),
    (r"Invalid (initial|statement)", "a bare name consists of letters, digits, _ and -; other names need quotes"),
    (r"character", "remove the character, or write it as \\uXXXX in double quotes"),
)
_OPEN_QUOTES = re.compile(r"(Illegal|Found invalid) character '\\n'|Unterminated|Expected \"'+\"")
_PLACE = re.compile(r"line (\d+), column (\d+)")
_LEADING_ZERO = re.compile(r"(?:^|[\s=\[,{])[+-]?0$")
_QUOTES = re.compile(
    r"""
      \#[^\n]*
    | \"""(?: [^"\\] | \\. | "{1,2}(?!") )*+ "{3,5} | \'''(?: [^'] | '{1,2}(?!') )*+ '{3,5}
    | (?P<open> \""" | \''' )
    | "(?: [^"\\\n] | \\[^\n] )*+" | '[^'\n]*+'
    | (?P<open_line> ["'] )
    """,
    re.VERBOSE | re.DOTALL,
)
"""Comments, texts in quotes, and quotes that open and are not closed: none of these lies within another."""
_NAMES = re.compile(r"Cannot declare \((.*?),?\) twice")


def explained(error: tomllib.TOMLDecodeError, text: str) -> str:
    """Return where the error of `text` is, what is wrong, and how to fix it; never a value, which may be a secret."""
    what, _, where = str(error).removesuffix(")").rpartition(" (at ")
    if _OPEN_QUOTES.match(what) and (opened := _open_quotes(text)):
        return opened
    if where == "end of document":
        where = f"line {max(1, len(text.splitlines()))}, the end of the file"
    elif (place := _PLACE.fullmatch(where)) is not None and (better := _by_place(text, int(place[1]), int(place[2]))):
        return f"{where}: {better}"
    fix = next((fix for pattern, fix in _FIXES if re.search(pattern, what)), "")
    if (twice := _NAMES.search(what)) is not None:
        names = ".".join(re.findall(r"'([^']*)'", twice[1]))
        what = f"[{names}] is declared twice"
    what = what.replace(r"'\n'", "end of line")
    return f"{where}: {what[:1].lower()}{what[1:]}" + (f"; {fix}" if fix else "")


def _open_quotes(text: str) -> str:
    """Return where the first unclosed quotes in `text` open, and the fix; empty if all are closed."""
    for match in _QUOTES.finditer(text):
        if (kind := match.lastgroup) is None:
            continue
        before = text[: match.start()]
        where = f"line {before.count(chr(10)) + 1}, column {match.start() - before.rfind(chr(10))}"
        if kind == "open_line":
            fix = "close it, or use three quotes for a text of several lines"
            return f"{where}: the quote that opens there is not closed on its line; {fix}"
        return f"{where}: the three quotes that open there are not closed; close the text with the same three"
    return ""


def _by_place(text: str, line: int, column: int) -> str:
    """Return a better cause and fix, if the characters at that place show more than the error; else nothing."""
    row = text.split("\n")[line - 1]
    before, at = row[: column - 1], row[column - 1 : column]
    if at.isdecimal() and _LEADING_ZERO.search(before):
        return "a number begins with 0; remove the leading zero, or write text in quotes"
    if not at and before.rstrip().endswith(("{", ",")) and "{" in before:
        return "a table in braces ends on the line on which it begins; write it on one line, or as [a.table] of its own"
    return ""
