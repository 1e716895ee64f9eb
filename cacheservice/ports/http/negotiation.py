"""Negotiates the media type and the coding.

The functions depend only on the headers' values. A malformed part is skipped. A header without valid parts
counts as absent (RFC 9110, 2.4 allows it).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

# Each alternative starts with a different character, so that these never backtrack.
_LIST_PART = re.compile(rb'(?:[^,"]+|"(?:[^"\\]+|\\.)*+"?)++', re.DOTALL)
_PARAMETER = re.compile(rb'(?:[^;"]+|"(?:[^"\\]+|\\.)*+"?)++', re.DOTALL)
_QUALITY = re.compile(rb"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")


class Codings(NamedTuple):
    """The content codings that a client accepts.

    `gzip` is true if it is requested by name, and with at least the weight of identity.
    """

    gzip: bool
    gzip_allowed: bool
    identity_allowed: bool


ANY_CODING = Codings(gzip=False, gzip_allowed=True, identity_allowed=True)


def media_type(accept: bytes | None, offered: Sequence[bytes]) -> bytes | None:
    """Return the media type of `offered` that the Accept header prefers.

    Of equals it is the first; None if the header accepts none. The most specific matching range decides (RFC 9110,
    12.5.1). Parameters other than `q` are ignored, because the offered types have none.
    """
    ranges = {} if accept is None else _weighted(accept)
    if not ranges:
        return offered[0]

    def quality(offer: bytes) -> float:
        kind, _, _ = offer.partition(b"/")
        for media_range in (offer, kind + b"/*", b"*/*"):
            if media_range in ranges:
                return ranges[media_range]
        return 0.0

    best = max(offered, key=quality)
    return best if quality(best) > 0 else None


def codings(accept_encoding: bytes | None) -> Codings:
    """Parse the Accept-Encoding header (RFC 9110, 12.5.3).

    ``*`` alone does not request gzip: it only allows it.
    """
    weights = {} if accept_encoding is None else _weighted(accept_encoding)
    if not weights:
        return ANY_CODING
    named = max(weights.get(b"gzip", -1.0), weights.get(b"x-gzip", -1.0))
    other = weights.get(b"*")
    identity = weights.get(b"identity")
    gzip_allowed = named > 0 or (named < 0 and bool(other))
    identity_allowed = identity > 0 if identity is not None else other != 0
    return Codings(named > 0 and named >= (identity or 0.0), gzip_allowed, identity_allowed)


def _weighted(value: bytes) -> dict[bytes, float]:
    """Return the parts of a list with their weights; the last duplicate counts."""
    weights: dict[bytes, float] = {}
    for part in _LIST_PART.findall(value):
        name, *parameters = [piece.strip(b" \t") for piece in _PARAMETER.findall(part)] or [b""]
        quality = next((p[2:] for p in parameters if p[:2].lower() == b"q="), b"1")
        if name and _QUALITY.fullmatch(quality):
            weights[name.lower()] = float(quality)
    return weights
