"""The keys that committed transactions have changed, kept until no snapshot needs them. Pure: no I/O, no clock.

A delta from a snapshot reads the keys of all transactions that the snapshot does not see, whatever the order of their
commits. The memory is bounded: beyond the bounds the keys of a table are forgotten, and a delta that would need them is
not possible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cacheservice.cache.identity import Visibility
from cacheservice.sources.postgres.logical.pgoutput import Begin, Changed, Commit, Decoded, Key, Truncated

_KEY_BYTES = 100
"""What a key takes besides its text: a tuple, its strings, and its place in a set."""
_TRANSACTION_BYTES = 600
"""What the keys of one table take besides, in each transaction."""
_MOST_LOST = 1000


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

    def lose(self, oid: int) -> None:
        """Forget the keys of a table that the transaction in progress has changed, or will change."""
        if self._xid is not None:
            self._changed[oid] = None

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


class _Lost:
    """The transactions whose keys of a table are not known: exactly while they are few, otherwise all up to a number.

    An open transaction that is older than all of these then prevents deltas of the table until it ends.
    """

    def __init__(self) -> None:
        self.xids: set[int] = set()
        self.through = 0

    def add(self, xid: int) -> None:
        self.xids.add(xid)
        if len(self.xids) > _MOST_LOST:
            self.through = max(self.through, *self.xids)
            self.xids.clear()

    def are_included(self, snapshot: Visibility) -> bool:
        return self.through < snapshot.xmin and all(map(snapshot.includes, self.xids))

    def forget(self, snapshots: Sequence[Visibility]) -> None:
        self.xids = {xid for xid in self.xids if not all(each.includes(xid) for each in snapshots)}


class Kept:
    """The changes of committed transactions, in the order of their commits.

    :param bounds: of the keys of all transactions; beyond them, the keys of the table with the most are forgotten.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._transactions: list[tuple[int, dict[int, frozenset[Key]]]] = []
        self._lost: dict[int, _Lost] = {}
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

    @property
    def transactions(self) -> int:
        """The number of transactions whose keys are kept."""
        return len(self._transactions)

    def add(self, transaction: Committed) -> None:
        """Keep the changes of a transaction."""
        known: dict[int, frozenset[Key]] = {}
        for oid, keys in transaction.changed.items():
            if keys is None:
                self._lost.setdefault(oid, _Lost()).add(transaction.xid)
            else:
                known[oid] = keys
                self._note(oid, keys, 1)
        if known:
            self._transactions.append((transaction.xid, known))
        while self.count > self._bounds.keys or self.size_bytes > self._bounds.size_bytes:
            self.lose(max(self._size_bytes, key=self._size_bytes.__getitem__))

    def changed(self, oid: int, snapshot: Visibility) -> frozenset[Key] | None:
        """Return the keys of a table that were changed by transactions that a snapshot does not include.

        :returns: None if they are not known any more, or never were, as after TRUNCATE.
        """
        lost = self._lost.get(oid)
        if lost is not None and not lost.are_included(snapshot):
            return None
        keys: set[Key] = set()
        for xid, changed in self._transactions:
            if oid in changed and not snapshot.includes(xid):
                keys |= changed[oid]
        return frozenset(keys)

    def forget(self, snapshots: Sequence[Visibility]) -> None:
        """Forget the transactions that all of these snapshots include; without any snapshot, all."""
        kept: list[tuple[int, dict[int, frozenset[Key]]]] = []
        for xid, changed in self._transactions:
            if all(each.includes(xid) for each in snapshots):
                for oid, keys in changed.items():
                    self._note(oid, keys, -1)
            else:
                kept.append((xid, changed))
        self._transactions = kept
        for lost in self._lost.values():
            lost.forget(snapshots)

    def lose(self, oid: int) -> None:
        """Forget the keys of a table, but not which transactions have changed it."""
        kept: list[tuple[int, dict[int, frozenset[Key]]]] = []
        for xid, changed in self._transactions:
            if changed.pop(oid, None) is not None:
                self._lost.setdefault(oid, _Lost()).add(xid)
            if changed:
                kept.append((xid, changed))
        self._transactions = kept
        self._count.pop(oid, None)
        self._size_bytes.pop(oid, None)

    def _note(self, oid: int, keys: frozenset[Key], sign: int) -> None:
        size = _TRANSACTION_BYTES + sum(map(size_bytes, keys))
        self._count[oid] = self._count.get(oid, 0) + sign * len(keys)
        self._size_bytes[oid] = self._size_bytes.get(oid, 0) + sign * size


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
