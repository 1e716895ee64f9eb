"""Derives entity tags from content.

So they are equal at all replicas and after a restart.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from twisted.internet.defer import Deferred

from cacheservice.base.interfaces import Clock
from cacheservice.base.timers import pause
from cacheservice.cache.digest import DIGEST_BYTES, document_digest
from cacheservice.cache.rows import Rows
from cacheservice.ports.http.response_heads import Representation

AT_ONCE_ROWS = 512
"""If they are short, their digest takes a third of a millisecond."""


def row_tag(document: bytes, form: Representation) -> bytes:
    """Return a strong tag: the document is sent byte for byte."""
    return b'"%b%b"' % (document_digest(document), form.tag_suffix)


def whole_tag(rows: Rows, form: Representation) -> bytes:
    """Return the opaque tag of a whole dataset; send it as a weak tag.

    Replicas send equal rows in different orders. The digest must have been computed.
    """
    assert rows.digest is not None, "the digest is computed first"
    return b'"%b%b"' % (rows.digest.to_bytes(DIGEST_BYTES, "big").hex().encode(), form.tag_suffix)


class Digests:
    """Computes digests of whole datasets in slices.

    Each is computed once for any number of waiting clients.

    :param clock: `IReactorTime`, for turns of the reactor.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: WeakKeyDictionary[Rows, list[Deferred[None]]] = WeakKeyDictionary()

    async def compute(self, rows: Rows) -> None:
        """Compute `rows.digest`, or wait for a computation in progress."""
        while rows.digest is None:
            if (waiting := self._waiting.get(rows)) is not None:
                computed: Deferred[None] = Deferred()
                waiting.append(computed)
                await computed
            else:
                await self._compute(rows)

    async def _compute(self, rows: Rows) -> None:
        self._waiting[rows] = []
        try:
            for _ in rows.digesting():
                if rows.count > AT_ONCE_ROWS:
                    await pause(self._clock)
        finally:
            # Also if its client has disconnected: another waiting client then starts again.
            for computed in self._waiting.pop(rows):
                computed.callback(None)
