"""The datasets as Redis clients see them: each is a hash, and each of its rows is a string key NAME:KEY, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy

from cacheservice.cache.cache import Cache
from cacheservice.cache.counts import Reads
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.events import Added, Changed, Ended, Event
from cacheservice.cache.reading import NotLoaded, TooOld, served
from cacheservice.cache.rows import Rows
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ports.held import Streamed
from cacheservice.ports.resp.reply import CommandError
from cacheservice.ports.resp.scan import SortedShards, numbered

WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"


class Datasets:
    """The datasets by name, with the snapshots that are served now or, if `frozen`, were served at one moment."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.sorted_shards = SortedShards()
        self._by_name: dict[bytes, Dataset] = {}
        # None until SCAN needs it.
        self._numbered: list[tuple[int, bytes]] | None = None
        cache.events.subscribe(self._declared, Added, Changed)
        cache.events.subscribe(self._ended, Ended)
        for dataset in cache.datasets.values():
            self._declared(Added(dataset.name))

    def _declared(self, event: Event) -> None:
        name = event.dataset.encode()
        if name not in self._by_name:
            self._by_name[name] = self.cache.dataset(event.dataset)
            self._numbered = None

    def _ended(self, event: Event) -> None:
        del self._by_name[event.dataset.encode()]
        self._numbered = None

    def frozen(self) -> Datasets:
        """Return a copy that keeps the snapshots served now."""
        frozen = copy(self)
        frozen._by_name = {name: copy(dataset) for name, dataset in self._by_name.items()}
        return frozen

    # All datasets

    def snapshots(self) -> dict[str, Snapshot]:
        """Return the snapshots of all datasets by name."""
        return {each.name: each.snapshot for each in self._by_name.values() if each.snapshot is not None}

    def loaded(self) -> list[Dataset]:
        """Return the datasets that have a snapshot."""
        return [dataset for dataset in self._by_name.values() if dataset.snapshot is not None]

    def key_count(self) -> int:
        """Return the number of keys: one for each loaded dataset, and one for each of its rows."""
        return sum(len(snapshot.rows) + 1 for snapshot in self.snapshots().values())

    def in_order(self) -> list[tuple[int, bytes]]:
        """Return the numbers and names of the datasets in the order of SCAN."""
        if self._numbered is None:
            self._numbered = numbered(self._by_name)
        return self._numbered

    # One dataset

    def find(self, name: bytes) -> Dataset:
        """Return the dataset `name`.

        :raises CommandError: ERR if it is unknown.
        """
        dataset = self._by_name.get(name)
        if dataset is None:
            raise CommandError(f"ERR unknown dataset '{name[:64].decode('utf-8', 'replace')}'")
        return dataset

    def rows(self, name: bytes) -> Rows:
        """Return the rows of `name`.

        :raises CommandError: LOADING or NOTLOADED without a snapshot, STALE if it is expired and `on_expired` is
            "refuse" (docs/reading.md), or ERR for an unknown dataset.
        """
        return self._served(self.find(name), None)

    def to_read(self, name: bytes) -> tuple[Rows, Reads]:
        """Return the rows of `name`, and the counts for reads of them.

        :raises CommandError: as `rows`; the error is counted.
        """
        dataset = self.find(name)
        reads = dataset.counts.resp
        return self._served(dataset, reads), reads

    def _served(self, dataset: Dataset, reads: Reads | None) -> Rows:
        try:
            return served(dataset, reads).rows
        except NotLoaded as error:
            if self.cache.is_starting:
                # Clients treat this as a restart of the server, and reconnect.
                raise CommandError(f"LOADING {error}") from None
            raise CommandError(f"NOTLOADED {error}; CACHE.INFO {dataset.name} has its last attempt") from None
        except TooOld as error:
            raise CommandError(f"STALE {error}") from None

    def keeping(self, answer: bytes | Iterator[bytes], names: Iterable[bytes]) -> bytes | Iterator[bytes]:
        """Return the answer, with the snapshots that it uses if it is in pieces.

        :param names: the datasets of the answer.
        """
        if isinstance(answer, bytes):
            return answer
        datasets = [self._by_name[name] for name in names]
        return Streamed(answer, {each.name: each.snapshot for each in datasets if each.snapshot is not None})

    # Keys

    def string(self, key: bytes) -> tuple[Rows, bytes]:
        """Return the rows of NAME and the KEY of a string key NAME:KEY.

        :raises CommandError: also for the key of a dataset itself, which is a hash.
        """
        name, colon, row = key.partition(b":")
        rows = self.rows(name)
        if not colon and row not in rows:
            raise CommandError(WRONG_TYPE)
        return rows, row

    def hash(self, key: bytes) -> Rows | None:
        """Return the rows of the hash `key`; None for NAME:KEY without a row.

        :raises CommandError: also for NAME:KEY with a row, which is a string.
        """
        name, colon, row = key.partition(b":")
        return _as_hash(self.rows(name), colon, row)

    def hash_to_read(self, key: bytes) -> tuple[Rows | None, Reads]:
        """Return the rows of the hash `key`, and the counts for reads of it."""
        name, colon, row = key.partition(b":")
        rows, reads = self.to_read(name)
        return _as_hash(rows, colon, row), reads

    def whole_hash(self, key: bytes) -> Rows | None:
        """Return the rows of the hash `key`, and count it as one read."""
        rows, reads = self.hash_to_read(key)
        if rows is None:
            reads.miss()
        else:
            reads.hit()
        return rows

    def kind(self, key: bytes) -> str:
        """Return the type of a key as TYPE does."""
        name, colon, row = key.partition(b":")
        rows = self.rows(name)
        if not colon:
            return "hash"
        return "string" if row in rows else "none"


def _as_hash(rows: Rows, colon: bytes, row: bytes) -> Rows | None:
    if not colon:
        return rows
    if row in rows:
        raise CommandError(WRONG_TYPE)
    return None
