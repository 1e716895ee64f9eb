"""The files of the dashboard.

They are read once and sent with an entity tag, so that a browser fetches a file only if it has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

from twisted.web.http import datetimeToString

from cacheservice.ports.http.bodies import compress_now
from cacheservice.ports.http.response_heads import status_line

PAGE = b"index.html"

_TYPES = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
    ".txt": b"text/plain; charset=utf-8",
}
_PROTECTION = b"".join(
    b"%b: %b\r\n" % header
    for header in (
        (
            b"Content-Security-Policy",
            b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
            b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
        ),
        (b"X-Content-Type-Options", b"nosniff"),
        (b"X-Frame-Options", b"DENY"),
        (b"Referrer-Policy", b"no-referrer"),
        (b"Cross-Origin-Opener-Policy", b"same-origin"),
        (b"Cross-Origin-Embedder-Policy", b"require-corp"),
        (b"Cross-Origin-Resource-Policy", b"same-origin"),
    )
)


class Asset(NamedTuple):
    """One file, plain and compressed; `tag` is a digest of its content."""

    content_type: bytes
    tag: bytes
    plain: bytes
    zipped: bytes

    def entity_tag(self, gzip: bool) -> bytes:
        """Return the entity tag; it differs for each coding (RFC 9110, 8.8.3)."""
        return b'"%b%b"' % (self.tag, b"-gzip" if gzip else b"")

    def head(self, status: int, wall_s: float, gzip: bool = False) -> bytes:
        """Return the head of a response with this file.

        A browser stores the file and revalidates it for each use.

        :param wall_s: seconds since the epoch.
        """
        lines = [status_line(status), b"Date: %b\r\n" % datetimeToString(wall_s)]
        if status == 401:  # the page that prompts for the token
            lines.append(b"Cache-Control: no-store\r\n")
        else:
            lines.append(b"Cache-Control: no-cache\r\nETag: %b\r\n" % self.entity_tag(gzip))
        if status != 304:
            lines.append(b"Content-Type: %b\r\n%b" % (self.content_type, b"Content-Encoding: gzip\r\n" * gzip))
        return b"".join([*lines, b"Vary: Accept, Accept-Encoding\r\n", _PROTECTION])


def load() -> Mapping[bytes, Asset]:
    """Read all files of the dashboard; return them by name."""
    files = resources.files(__package__).joinpath("dashboard").iterdir()
    return {file.name.encode(): _asset(file.name, file.read_bytes()) for file in files if _suffix(file.name) in _TYPES}


def _asset(name: str, plain: bytes) -> Asset:
    return Asset(_TYPES[_suffix(name)], hashlib.sha256(plain).hexdigest()[:16].encode(), plain, compress_now(plain))


def _suffix(name: str) -> str:
    return name[name.rfind(".") :]
