"""tomllib's errors with what to do about them: where, what, and the fix, in one line."""

from __future__ import annotations

import re
import tomllib

_FIXES = (
    (r"Illegal character '\\n'", "a text in quotes is not closed; close it, or use three quotes for several lines"),
    (r"Unterminated|Expected \"'+\"", "a text in quotes is not closed; close it with the quotes that it began with"),
    (r"Cannot declare .* twice", "write this table once, with all of its keys, or give one of the two another name"),
    (r"Cannot overwrite a value", "a key is set twice; remove one of the two"),
    (r"Cannot", "a table in braces is complete where it is written; add its keys there"),
    (r"Expected '='", "write it as key = value"),
    (r"Unclosed array", "close the list with ]"),
    (r"Unclosed inline table", "close the table with }, on the line on which it begins"),
    (r"Expected '\]+' at the end", "close the table's name with ], as in [datasets.products]"),
    (r"Unescaped", "write \\\\ for a backslash, or use single quotes, which take it as it is"),
    (r"Expected newline", "write one key on a line; text needs quotes"),
    (r"Invalid value", 'write text in quotes; numbers, true and false without; a list as ["a", "b"]'),
    (r"Invalid (initial|statement)", "a name consists of letters, digits, _ and -; any other needs quotes"),
    (r"character", "remove the character, or write it as \\uXXXX in double quotes"),
)
_NAMES = re.compile(r"Cannot declare \((.*?),?\) twice")


def explained(error: tomllib.TOMLDecodeError, text: str) -> str:
    """Return where the error of `text` is, what is wrong, and how to fix it; never a value, which may be a secret."""
    what, _, where = str(error).removesuffix(")").rpartition(" (at ")
    if where == "end of document":
        where = f"line {max(1, len(text.splitlines()))}, the end of the file"
        quotes = [number for number, line in enumerate(text.splitlines(), 1) if re.search('"""|\'', line)]
        if quotes and what.startswith(("Unterminated", "Expected")):
            where += f" (the text may begin on line {quotes[-1]})"
    fix = next((fix for pattern, fix in _FIXES if re.search(pattern, what)), "")
    if (twice := _NAMES.search(what)) is not None:
        names = ".".join(re.findall(r"'([^']*)'", twice[1]))
        what = f"[{names}] is declared twice"
    what = what.replace(r"'\n'", "end of line")
    return f"{where}: {what[:1].lower()}{what[1:]}" + (f"; {fix}" if fix else "")
