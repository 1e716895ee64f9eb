"""The keys that committed transactions have changed, kept until no snapshot needs them. Pure: no I/O, no clock.

A delta from a snapshot reads the keys of all transactions that the snapshot does not see, whatever the order of their
commits. The memory is bounded: beyond the bounds the keys of a table are forgotten, and a delta that would need them is
not possible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

from cacheservice.cache.identity import Visibility
from cacheservice.sources.postgres.logical.pgoutput import Begin, Changed, Commit, Decoded, Key, Truncated

_KEY_BYTES = 100
"""What a key takes besides its text: a tuple, its strings, and its place in a set."""
_TRANSACTION_BYTES = 600
"""What the keys of one table take besides, in each transaction."""
_MOST_LOST = 1000
_PART_KEYS = 4096
"""So many keys are in one set at most: a larger one would grow, be read or be freed for longer than a turn may take."""


class Bounds(NamedTuple):
    """How much is kept at most.

    :param keys: the number of keys.
    :param size_bytes: the memory that they take, about.
    """

    keys: int
    size_bytes: int


class Part(NamedTuple):
    """Some of the keys of a table that one transaction has changed."""

    oid: int
    keys: frozenset[Key]
    size_bytes: int


class Committed(NamedTuple):
    """A transaction that has changed watched tables.

    :param xid: its number, with all of its 64 bits.
    :param changed: the keys of each table; None if they are not known.
    :param more: more keys of these tables, if a transaction has changed many. They may occur in several parts.
    """

    xid: int
    changed: Mapping[int, frozenset[Key] | None]
    more: tuple[Part, ...] = ()


class Trash:
    """Large sets of keys that are not needed any more. They are freed one by one, because freeing takes time.

    :param filled: called when there is something to free.
    """

    def __init__(self, filled: Callable[[], object] = lambda: None) -> None:
        self._filled = filled
        self._sets: list[Set[Key]] = []

    def add(self, keys: Set[Key]) -> None:
        """Take over a set; the caller keeps no reference."""
        if len(keys) >= _PART_KEYS // 4:
            self._sets.append(keys)
            if len(self._sets) == 1:
                self._filled()

    def free(self) -> bool:
        """Free a set; return whether there are more."""
        if self._sets:
            self._sets.pop()
        return bool(self._sets)


class _Growing:
    """The keys of a table in the transaction in progress that are not in a part yet."""

    __slots__ = ("keys", "size_bytes")

    def __init__(self) -> None:
        self.keys: set[Key] = set()
        self.size_bytes = 0


class Transactions:
    """Collects the changes of one transaction after the other.

    :param full_xid: returns all 64 bits of a number.
    """

    def __init__(self, bounds: Bounds, full_xid: Callable[[int], int], trash: Trash | None = None) -> None:
        self._bounds = bounds
        self._full_xid = full_xid
        self._trash = Trash() if trash is None else trash
        self._xid: int | None = None
        self._changed: dict[int, _Growing | None] = {}
        self._more: list[Part] = []
        self._count = self._size_bytes = 0

    def take(self, message: Decoded) -> Committed | None:
        """Take the next message; return the transaction that it ends, if that has changed watched tables."""
        if type(message) is Changed:
            self._add(message.oid, message.keys)
            return None
        match message:
            case Begin(xid):
                self._xid, self._changed, self._more = xid, {}, []
                self._count = self._size_bytes = 0
            case Truncated(oids):
                for oid in oids:
                    self._lose(oid)
            case Commit() if self._xid is not None:
                xid, changed, self._xid, self._changed = self._xid, self._changed, None, {}
                more, self._more = self._more, []
                if changed:
                    known = {oid: None if each is None else frozenset(each.keys) for oid, each in changed.items()}
                    return Committed(self._full_xid(xid), known, tuple(more))
        return None

    def lose(self, oid: int) -> None:
        """Forget the keys of a table that the transaction in progress has changed, or will change."""
        if self._xid is not None:
            self._lose(oid)

    def _add(self, oid: int, keys: tuple[Key, ...] | None) -> None:
        growing = self._changed.get(oid)
        if growing is None:
            if oid in self._changed:
                return
            growing = self._changed[oid] = _Growing()
        if keys is None:
            self._lose(oid)
            return
        known = growing.keys
        for key in keys:
            if key not in known:
                known.add(key)
                size = size_bytes(key)
                growing.size_bytes += size
                self._size_bytes += size
                self._count += 1
        if self._count > self._bounds.keys or self._size_bytes > self._bounds.size_bytes:
            for each in self._changed:
                self._lose(each)
            self._count = self._size_bytes = 0
        elif len(known) >= _PART_KEYS:
            self._more.append(Part(oid, frozenset(known), growing.size_bytes))
            self._changed[oid] = _Growing()

    def _lose(self, oid: int) -> None:
        if self._changed.get(oid) is not None:
            lost, self._more = _split(self._more, oid)
            for part in lost:
                self._trash.add(part.keys)
        self._changed[oid] = None


def _split(parts: Sequence[Part], oid: int) -> tuple[list[Part], list[Part]]:
    """Return the parts of a table, and the others."""
    return [part for part in parts if part.oid == oid], [part for part in parts if part.oid != oid]


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

    def __init__(self, bounds: Bounds, trash: Trash | None = None) -> None:
        self._bounds = bounds
        self._trash = Trash() if trash is None else trash
        self._parts: list[tuple[int, Part]] = []
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
    def parts(self) -> int:
        """The number of sets of keys that are kept, at least one for each transaction and table."""
        return len(self._parts)

    def add(self, transaction: Committed) -> None:
        """Keep the changes of a transaction."""
        for oid, keys in transaction.changed.items():
            if keys is None:
                self._lost.setdefault(oid, _Lost()).add(transaction.xid)
            else:
                self._keep(transaction.xid, Part(oid, keys, sum(map(size_bytes, keys))))
        for part in transaction.more:
            self._keep(transaction.xid, part)
        while self.count > self._bounds.keys or self.size_bytes > self._bounds.size_bytes:
            self.lose(max(self._size_bytes, key=self._size_bytes.__getitem__))

    def changed(self, oid: int, snapshot: Visibility, most: int | None = None) -> Set[Key] | None:
        """Return the keys of a table that were changed by transactions that a snapshot does not include.

        :param most: if there are more, some are left out.
        :returns: None if they are not known any more, or never were, as after TRUNCATE.
        """
        lost = self._lost.get(oid)
        if lost is not None and not lost.are_included(snapshot):
            return None
        keys: set[Key] = set()
        for xid, part in self._parts:
            if part.oid == oid and not snapshot.includes(xid):
                keys |= part.keys
                if most is not None and len(keys) > most:
                    break
        return keys

    def unseen(self, oid: int, snapshot: Visibility) -> set[int]:
        """Return the transactions that have changed a table and that a snapshot does not include."""
        xids = {xid for xid, part in self._parts if part.oid == oid}
        if (lost := self._lost.get(oid)) is not None:
            xids |= lost.xids
        return {xid for xid in xids if not snapshot.includes(xid)}

    def forget(self, snapshots: Sequence[Visibility]) -> None:
        """Forget the transactions that all of these snapshots include; without any snapshot, all."""
        kept: list[tuple[int, Part]] = []
        for entry in self._parts:
            if all(each.includes(entry[0]) for each in snapshots):
                self._note(entry[1], -1)
                self._trash.add(entry[1].keys)
            else:
                kept.append(entry)
        self._parts = kept
        for lost in self._lost.values():
            lost.forget(snapshots)

    def lose(self, oid: int) -> None:
        """Forget the keys of a table, but not which transactions have changed it."""
        kept: list[tuple[int, Part]] = []
        for entry in self._parts:
            xid, part = entry
            if part.oid == oid:
                self._lost.setdefault(oid, _Lost()).add(xid)
                self._trash.add(part.keys)
            else:
                kept.append(entry)
        self._parts = kept
        self._count.pop(oid, None)
        self._size_bytes.pop(oid, None)

    def _keep(self, xid: int, part: Part) -> None:
        self._parts.append((xid, part))
        self._note(part, 1)

    def _note(self, part: Part, sign: int) -> None:
        oid, keys, size = part
        self._count[oid] = self._count.get(oid, 0) + sign * len(keys)
        self._size_bytes[oid] = self._size_bytes.get(oid, 0) + sign * (_TRANSACTION_BYTES + size)


def size_bytes(key: Key) -> int:
    """Return the memory that a key takes, about."""
    return _KEY_BYTES + sum(map(len, filter(None, key)))


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
