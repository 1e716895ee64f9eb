"""The changes that one stream has shown, for the datasets that need them. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

from cacheservice.cache.identity import Visibility
from cacheservice.sources.postgres.logical.kept import Bounds, Committed, Kept, Transactions, Trash, full_xid
from cacheservice.sources.postgres.logical.pgoutput import Decoder, Key, Relation
from cacheservice.sources.postgres.logical.tables import Sent

BOUNDS = Bounds(keys=500_000, size_bytes=128 << 20)
"""If more has changed since the last refresh of a dataset, it is read in full, which takes less memory."""
_FEW = 1000
_MOST_UNREAD = 10_000
"""Of more transactions that no read has included yet, the last are remembered: the others are visible by then."""
_BOOLEANS = {"t": "true", "f": "false"}


class Captured:
    """Keeps the changes since the stream began, until no dataset needs them.

    A dataset is known with its first read while the stream runs. Of tables that no dataset is known to watch, only the
    transactions are noted that have changed them.

    `transactions` and `keys` count what was shown. `decoder` and `open` are for the stream.

    :param next_xid: all bits of the number of the next transaction on the server.
    :param trash: takes large sets of keys that are not needed any more.
    """

    def __init__(self, next_xid: int, bounds: Bounds = BOUNDS, trash: Trash | None = None) -> None:
        self.transactions = self.keys = 0
        self.trash = Trash() if trash is None else trash
        self.decoder = Decoder(self._places)
        self.open = Transactions(bounds, self._full_xid, self.trash)
        self.kept = Kept(bounds, self.trash)
        self._near = next_xid
        self._watching: dict[str, tuple[Sent, ...]] = {}
        self._reading: dict[str, Visibility] = {}
        self._unread: dict[str, set[int]] = {}
        self._columns: dict[int, tuple[str, ...]] = {}
        self._above: frozenset[int] = frozenset()
        self._unfit: set[int] = set()
        self._held = 0
        self._forgets_at = _FEW

    def learn(self, dataset: str, sent: tuple[Sent, ...], now: Visibility) -> bool:
        """Note the tables that a dataset watches now; none if it cannot use the stream.

        A commit is in the log before other sessions see it. So a read that begins at once may miss a transaction that
        has been shown.

        :param now: the snapshot of a read, whose result may become the start of a delta.
        :returns: whether the read misses such a transaction, so that another one must follow.
        """
        is_new = self._watching.get(dataset, ()) != sent
        unread = self._unread.get(dataset, set())
        if is_new:  # transactions since the slot was created may have been shown before the dataset was known
            unread = unread.union(*(self.kept.unseen(oid, now) for each in sent for oid in each.oids))
        # A standby sees a transaction before it decodes it, and its snapshots do not list those in progress.
        is_listed, below = now.in_progress is not None, now.xmin
        self._unread[dataset] = {xid for xid in unread if is_listed and xid >= below and not now.includes(xid)}
        self._watch(dataset, sent, now)
        return bool(self._unread[dataset])

    def _watch(self, dataset: str, sent: tuple[Sent, ...], now: Visibility) -> None:
        self._reading[dataset] = now
        if self._watching.get(dataset, ()) == sent:
            return
        self._watching[dataset] = sent
        columns: dict[int, dict[str, None]] = {}
        for each in (each for watching in self._watching.values() for each in watching):
            for oid in each.oids:
                columns.setdefault(oid, {}).update(dict.fromkeys(each.key))
        before, self._columns = self._columns, {oid: tuple(sorted(names)) for oid, names in columns.items()}
        self._above = frozenset(oid for watching in self._watching.values() for each in watching for oid in each.above)
        for oid in before:
            if self._columns.get(oid) != before[oid]:  # the kept keys have other columns
                self.kept.lose(oid)
                self.open.lose(oid)
        self._unfit.clear()
        self.decoder.renew()

    def committed(self, transaction: Committed) -> set[str]:
        """Keep the changes of a transaction; return the datasets that must be read because of them.

        A dataset whose last read began after the commit need not be read again.
        """
        self.transactions += 1
        self.keys += sum(len(keys) for keys in transaction.changed.values() if keys)
        self.keys += sum(len(part.keys) for part in transaction.more)
        self._near = transaction.xid
        if self._unfit:
            # Their rows may have been sent under the name of a table above them.
            transaction = transaction._replace(changed={**transaction.changed, **dict.fromkeys(self._unfit)})
        self.kept.add(transaction)
        self._held += 1
        concerned = {
            name
            for name, watching in self._watching.items()
            if any(not each.oids.isdisjoint(transaction.changed) for each in watching)
            and not self._reading[name].includes(transaction.xid)
        }
        for name in concerned:
            unread = self._unread.setdefault(name, set())
            unread.add(transaction.xid)
            if len(unread) > _MOST_UNREAD:
                self._unread[name] = set(sorted(unread)[-_FEW:])
        return concerned

    def changed(self, sent: Iterable[Sent], base: Visibility, most: int | None = None) -> Set[Key] | None:
        """Return the keys of a dataset that were changed by transactions that its snapshot does not include.

        :param most: if there are more, some are left out.
        :returns: None if they are not known.
        """
        found: set[Key] = set()
        for each in sent:
            for oid in each.oids:
                keys = self.kept.changed(oid, base, most)
                if keys is None:
                    return None
                if keys:
                    found |= _of_watch(keys, self._columns[oid], each)
        return found

    def forget(self, bases: Callable[[], Sequence[Visibility]]) -> None:
        """Forget the changes that no delta can need, if many are kept.

        :param bases: returns the snapshots from which deltas may start, besides those of reads in progress.
        """
        if self._held >= self._forgets_at:
            self.kept.forget([*bases(), *self._reading.values()])
            self._held = self.kept.parts
            self._forgets_at = max(_FEW, 2 * self._held)

    def keep_only(self, datasets: Iterable[str]) -> None:
        """Forget the datasets that are not declared any more."""
        for name in self._watching.keys() - set(datasets):
            self._watch(name, (), self._reading[name])
            del self._watching[name], self._reading[name]
            self._unread.pop(name, None)

    def _places(self, relation: Relation) -> list[int] | None:
        wanted = self._columns.get(relation.oid)
        if wanted is None:
            return None
        any_column = relation.oid in self._above
        places = {
            column.name: place for place, column in enumerate(relation.columns) if any_column or column.in_identity
        }
        if all(column in places for column in wanted):
            self._unfit.discard(relation.oid)
            return [places[column] for column in wanted]
        self._unfit.add(relation.oid)
        self.open.lose(relation.oid)
        return None

    def _full_xid(self, xid: int) -> int:
        return full_xid(xid, self._near)


def _of_watch(keys: Set[Key], columns: tuple[str, ...], watch: Sent) -> Set[Key]:
    """Return keys of all columns that are watched in a table as keys of one watch."""
    if columns == watch.key and not watch.booleans:
        return keys
    places = [columns.index(column) for column in watch.key]
    projected = (tuple([key[place] for place in places]) for key in keys)
    if not watch.booleans:
        return frozenset(projected)
    # The triggers record true and false, as casts to text do; the log has the output of the type.
    return frozenset(
        tuple(
            [
                _BOOLEANS[value] if place in watch.booleans and value is not None else value
                for place, value in enumerate(key)
            ]
        )
        for key in projected
    )
