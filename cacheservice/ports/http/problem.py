"""Refusals, as RFC 9457 wants them: ``application/problem+json`` with type, title, status, detail and instance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus

_NO_MEMBERS: Mapping[str, object] = {}


class Problem(Exception):
    """A request cannot be answered as it was meant; the message is the `detail` that its sender reads.

    :param headers: whole header lines for this answer, each with its CRLF.
    :param members: what the object says besides, such as the age that was too high.
    """

    def __init__(
        self, status: int, detail: str, headers: bytes = b"", members: Mapping[str, object] = _NO_MEMBERS
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers
        self.members = members

    def body(self, target: bytes) -> bytes:
        """The object, on one line; `target` is what was asked for, as it came."""
        instance, _, _ = target.decode("ascii", "replace").partition("?")  # a query may hold a secret
        problem = {"type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status}
        problem |= {"detail": self.detail} | ({"instance": instance} if instance else {}) | dict(self.members)
        return json.dumps(problem).encode() + b"\n"
