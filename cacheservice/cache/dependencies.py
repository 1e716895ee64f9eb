"""The objects that a result depends on besides its rows, as its source recorded them."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dependencies:
    """Only the source interprets `found`. Results with equal `found` and `digest` have documents of the same form."""

    found: str
    digest: str

    def to_text(self) -> str:
        """Return the text for a saved file."""
        return json.dumps([self.found, self.digest])

    @classmethod
    def from_text(cls, text: str) -> Dependencies | None:
        """Return the dependencies of a text by `to_text`; None for any other text."""
        try:
            found, digest = json.loads(text)
            return cls(str(found), str(digest)) if isinstance(json.loads(found), dict) else None
        except (ValueError, TypeError):
            return None
