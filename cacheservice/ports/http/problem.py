"""Error responses by RFC 9457.

They are ``application/problem+json`` with type, title, status, detail and instance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus

_NO_MEMBERS: Mapping[str, object] = {}


class Problem(Exception):
    """A request cannot be fulfilled; the message is the `detail` of the response.

    :param headers: complete header lines for this response, each with its CRLF.
    :param members: further members of the object, such as the age that was too high.
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
        """Return the object, on one line; `target` is the request's, as received."""
        instance, _, _ = target.decode("ascii", "replace").partition("?")  # a query may contain a secret
        problem = {"type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status}
        problem |= {"detail": self.detail} | ({"instance": instance} if instance else {}) | dict(self.members)
        return json.dumps(problem).encode() + b"\n"
