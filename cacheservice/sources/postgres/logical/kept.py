"""The keys that committed transactions have changed, kept until no snapshot needs them. Pure: no I/O, no clock.

A delta from a snapshot reads the keys of all transactions that the snapshot does not see, whatever the order of their
commits. The memory is bounded: beyond the bounds the keys of a table are forgotten, and a delta that would need them is
not possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from cacheservice.cache.identity import is_visible
from cacheservice.sources.postgres.logical.pgoutput import Begin, Changed, Commit, Decoded, Key, Truncated

_KEY_BYTES = 100
"""What a key takes besides its text: a tuple, its strings, and its place in a set."""


class Bounds(NamedTuple):
    """How much is kept at most.

    :param keys: the number of keys.
    :param size_bytes: the memory that they take, about.
    """

    keys: int
    size_bytes: int


class Committed(NamedTuple):
    """A transaction that has changed watched tables.

    :param xid: its number, with all of its 64 bits.
    :param changed: the keys of each table; None if they are not known.
    """

    xid: int
    changed: Mapping[int, frozenset[Key] | None]


class Transactions:
    """Collects the changes of one transaction after the other.

    :param full_xid: returns all 64 bits of a number.
    """

    def __init__(self, bounds: Bounds, full_xid: Callable[[int], int]) -> None:
        self._bounds = bounds
        self._full_xid = full_xid
        self._xid: int | None = None
        self._changed: dict[int, set[Key] | None] = {}
        self._count = self._size_bytes = 0

    def take(self, message: Decoded) -> Committed | None:
        """Take the next message; return the transaction that it ends, if that has changed watched tables."""
        match message:
            case Begin(xid):
                self._xid, self._changed = xid, {}
                self._count = self._size_bytes = 0
            case Changed(oid, keys):
                self._add(oid, keys)
            case Truncated(oids):
                self._changed.update(dict.fromkeys(oids))
            case Commit() if self._xid is not None:
                xid, changed, self._xid, self._changed = self._xid, self._changed, None, {}
                if changed:
                    known = {oid: None if keys is None else frozenset(keys) for oid, keys in changed.items()}
                    return Committed(self._full_xid(xid), known)
        return None

    def _add(self, oid: int, keys: tuple[Key, ...] | None) -> None:
        known = self._changed.setdefault(oid, set())
        if known is None:
            return
        if keys is None:
            self._changed[oid] = None
            return
        for key in keys:
            if key not in known:
                known.add(key)
                self._count += 1
                self._size_bytes += size_bytes(key)
        if self._count > self._bounds.keys or self._size_bytes > self._bounds.size_bytes:
            self._changed = dict.fromkeys(self._changed)
            self._count = self._size_bytes = 0


class Kept:
    """The changes of committed transactions, in the order of their commits.

    :param bounds: of the keys of all transactions; beyond them, the keys of the table with the most are forgotten.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._transactions: list[Committed] = []
        self._count: dict[int, int] = {}
        self._size_bytes: dict[int, int] = {}

    @property
    def count(self) -> int:
        """The number of keys."""
        return sum(self._count.values())

    @property
    def size_bytes(self) -> int:
        """The memory that the keys take, about."""
        return sum(self._size_bytes.values())

    def add(self, transaction: Committed) -> None:
        """Keep the changes of a transaction."""
        self._transactions.append(transaction)
        self._note(transaction, 1)
        while self.count > self._bounds.keys or self.size_bytes > self._bounds.size_bytes:
            self._lose(max(self._size_bytes, key=self._size_bytes.__getitem__))

    def changed(self, oid: int, snapshot: str, *, in_recovery: bool) -> frozenset[Key] | None:
        """Return the keys of a table that were changed by transactions that a snapshot does not see.

        :param snapshot: as `pg_current_snapshot()` returns it.
        :param in_recovery: whether it was taken on a standby.
        :returns: None if they are not known any more, or never were, as after TRUNCATE.
        """
        keys: set[Key] = set()
        for xid, changed in self._transactions:
            if oid in changed and not is_visible(xid, snapshot, in_recovery=in_recovery):
                more = changed[oid]
                if more is None:
                    return None
                keys |= more
        return frozenset(keys)

    def forget(self, snapshots: Iterable[tuple[str, bool]]) -> None:
        """Forget the transactions that all of these snapshots see; without any snapshot, all.

        :param snapshots: each with whether it was taken on a standby.
        """
        needed = tuple(snapshots)
        kept: list[Committed] = []
        gone: list[Committed] = []
        for each in self._transactions:
            is_seen = all(is_visible(each.xid, snapshot, in_recovery=standby) for snapshot, standby in needed)
            (gone if is_seen else kept).append(each)
        self._transactions = kept
        for each in gone:
            self._note(each, -1)

    def _note(self, transaction: Committed, sign: int) -> None:
        for oid, keys in transaction.changed.items():
            if keys:
                self._count[oid] = self._count.get(oid, 0) + sign * len(keys)
                self._size_bytes[oid] = self._size_bytes.get(oid, 0) + sign * sum(map(size_bytes, keys))

    def _lose(self, oid: int) -> None:
        """Forget the keys of a table, but not which transactions have changed it."""
        self._transactions = [
            Committed(xid, {**changed, oid: None} if oid in changed else changed) for xid, changed in self._transactions
        ]
        del self._count[oid], self._size_bytes[oid]


def size_bytes(key: Key) -> int:
    """Return the memory that a key takes, about."""
    return _KEY_BYTES + sum(len(part) for part in key if part is not None)


def full_xid(xid: int, near: int) -> int:
    """Return the number of a transaction with all of its 64 bits.

    :param xid: its lower 32 bits.
    :param near: the number of another transaction, less than 2^31 transactions before or after.
    """
    found = (near & ~0xFFFFFFFF) | xid
    if found - near > 1 << 31:
        return found - (1 << 32)
    if near - found > 1 << 31:
        return found + (1 << 32)
    return found
