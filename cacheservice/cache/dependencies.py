"""What a result depends on beside its rows, as its source recorded it."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dependencies:
    """Only the source understands `found`; two results with the same one and the same `digest` have equal forms."""

    found: str
    digest: str

    def to_text(self) -> str:
        """For a file."""
        return json.dumps([self.found, self.digest])

    @classmethod
    def from_text(cls, text: str) -> Dependencies | None:
        """:param text: of `to_text`; anything else is None."""
        try:
            found, digest = json.loads(text)
            return cls(str(found), str(digest)) if isinstance(json.loads(found), dict) else None
        except (ValueError, TypeError):
            return None
