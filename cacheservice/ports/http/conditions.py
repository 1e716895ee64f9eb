"""Evaluates the preconditions of a request (RFC 9110, 13) in the order of 13.2.2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from cacheservice.ports.http.problem import Problem

NAMES = frozenset({b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since"})

_ENTITY_TAG = re.compile(rb'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')


class Validators(NamedTuple):
    """The validators of a representation.

    They are its quoted opaque tag, whether that is weak, and its time of modification. `modified` is None if it is
    unknown, or if another content of this resource had the same second: then equal dates do not prove equal contents.
    """

    tag: bytes | None = None
    weak: bool = False
    modified: datetime | None = None


def is_not_modified(headers: Mapping[bytes, bytes], current: Validators) -> bool:
    """Return True if a GET or HEAD gets 304.

    :raises Problem: 412 if If-Match or If-Unmodified-Since is not met.
    """
    if not _may_go_on(headers, current):
        raise precondition_failed()
    tags = headers.get(b"if-none-match")
    if tags is not None:
        return matches(tags, current.tag)
    since = headers.get(b"if-modified-since")
    # Equal, not later: a rollback sets the date back, and a client must not keep a newer copy.
    return since is not None and current.modified is not None and _moment(since) == _whole(current.modified)


def precondition_failed() -> Problem:
    return Problem(412, "If-Match or If-Unmodified-Since does not hold for what is served now; GET it again")


def _may_go_on(headers: Mapping[bytes, bytes], current: Validators) -> bool:
    tags = headers.get(b"if-match")
    if tags is not None:
        if tags.strip(b" \t") == b"*":
            return True
        # The strong comparison: a weak tag on either side matches nothing.
        return not current.weak and any(not weak and tag == current.tag for weak, tag in _ENTITY_TAG.findall(tags))
    since = headers.get(b"if-unmodified-since")
    if since is None or current.modified is None or (moment := _moment(since)) is None:
        return True
    return _whole(current.modified) <= moment


def matches(if_none_match: bytes, tag: bytes | None) -> bool:
    """Return True if the header is ``*`` or contains the tag.

    It uses the weak comparison (RFC 9110, 13.1.2).
    """
    if if_none_match.strip(b" \t") == b"*" or if_none_match == tag:
        return True
    return tag is not None and any(given == tag for _, given in _ENTITY_TAG.findall(if_none_match))


def _moment(date: bytes) -> datetime | None:
    """Parse a date in any of the three forms of RFC 9110, 5.6.7.

    Return None for an invalid date: the header is then ignored.
    """
    try:
        moment = parsedate_to_datetime(date.decode("ascii"))
    except (ValueError, TypeError, OverflowError):
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)  # asctime's form is always in UTC


def _whole(moment: datetime) -> datetime:
    return moment.replace(microsecond=0)
