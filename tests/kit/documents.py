"""The pages of the documentation, as GitHub shows them."""

from __future__ import annotations

import re
from pathlib import Path

HEADING = re.compile(r"^#+ +(?P<title>.*?) *$", re.M)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them: lower case, without punctuation, blanks as dashes."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match["title"]) for match in HEADING.finditer(text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
