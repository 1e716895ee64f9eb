"""Where the lines of code stand that the documentation quotes. ``python -m tests.update_references`` corrects them.

A quotation is a link that names a file and a line, and below it a block with lines of that file, their common
indentation left out::

    [`cacheservice/app/service.py:97`](../cacheservice/app/service.py#L97)

    ```python
    stopped.addTimeout(_STOP_TIMEOUT_S, self._reactor)
    ```
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

from tests.kit.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

QUOTATION = re.compile(
    r"^\[`(?P<path>[\w./-]+):(?P<line>\d+)`\]\((?P<up>(?:\.\./)?)(?P=path)#L(?P<anchor>\d+)\)\n\n"
    r"```\w+\n(?P<code>.*?)^```$",
    re.M | re.S,
)


class Quotation(NamedTuple):
    """Quoted `code` begins at line `line` of `path`; `found` are the lines where it really begins."""

    path: str
    line: int
    code: str
    found: list[int]


def found_at(path: Path, code: str) -> list[int]:
    """The lines at which `code` begins in a file, whatever it is indented by; none if there is no file."""
    if not path.exists():
        return []
    lines, quoted = path.read_text(encoding="utf-8").splitlines(), code.splitlines()
    return [
        number
        for number in range(1, len(lines) - len(quoted) + 2)
        if dedent("\n".join(lines[number - 1 : number - 1 + len(quoted)])) == "\n".join(quoted)
    ]


def quotations(text: str) -> Iterator[Quotation]:
    """Those of a page."""
    for match in QUOTATION.finditer(text):
        if match["line"] != match["anchor"]:
            raise ValueError(f"the link of {match['path']}:{match['line']} goes to line {match['anchor']}")
        path = match["path"]
        yield Quotation(path, int(match["line"]), match["code"], found_at(ROOT / path, dedent(match["code"])))


def updated(text: str) -> str:
    """The page with the right numbers; what is quoted once in its file is put right, the rest is left as it is."""

    def put_right(match: re.Match[str]) -> str:
        path = match["path"]
        found = found_at(ROOT / path, dedent(match["code"]))
        if len(found) != 1:
            return match[0]
        return match[0].replace(
            f"[`{path}:{match['line']}`]({match['up']}{path}#L{match['anchor']})",
            f"[`{path}:{found[0]}`]({match['up']}{path}#L{found[0]})",
            1,
        )

    return QUOTATION.sub(put_right, text)


def main() -> int:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(updated(text), encoding="utf-8")
        for quotation in quotations(updated(text)):
            if quotation.line not in quotation.found:
                sys.stderr.write(f"{page.relative_to(ROOT)}: not (once) in {quotation.path}:\n{quotation.code}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
