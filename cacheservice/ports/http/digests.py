"""Entity tags out of content: the same at every replica and after a restart."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from cacheservice.cache.digest import DIGEST_BYTES, document_digest
from cacheservice.cache.rows import Rows
from cacheservice.ports.http.heads import Representation

AT_ONCE_ROWS = 512
"""Digested in a third of a millisecond, if they are short."""


def row_tag(document: bytes, form: Representation) -> bytes:
    """Strong: the document is what is sent, to the byte."""
    return b'"%b%b"' % (document_digest(document), form.tag_suffix)


def whole_tag(rows: Rows, form: Representation) -> bytes:
    """To be sent as a weak one: replicas send equal rows in different orders. The digest is known by now."""
    assert rows.digest is not None, "the digest is computed first"
    return b'"%b%b"' % (rows.digest.to_bytes(DIGEST_BYTES, "big").hex().encode(), form.tag_suffix)


class Digests:
    """Computes digests of whole datasets in slices, each once however many wait for it.

    :param clock: `IReactorTime`, for turns of the reactor.
    """

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self._waiting: WeakKeyDictionary[Rows, list[Deferred[None]]] = WeakKeyDictionary()

    async def compute(self, rows: Rows) -> None:
        """Return when `rows.digest` is known."""
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
                    await deferLater(self._clock, 0)
        finally:
            # Also when its client has gone: another one that waits begins again.
            for computed in self._waiting.pop(rows):
                computed.callback(None)
