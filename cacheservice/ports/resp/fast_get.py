"""The hot path of the RESP port: GETs that need no check (measured: `python -m benchmarks.resp`)."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from cacheservice.cache.cache import Cache
from cacheservice.cache.collectors import Shards
from cacheservice.cache.counts import Reads
from cacheservice.cache.events import Added, Changed, Ended, Event, Published, Renewed
from cacheservice.cache.rows import PATCHED_GROUP_BITS, PATCHED_GROUP_MASK, Groups

_Served = tuple[Shards, Groups, int, Reads]
"""The parts of a dataset that `hits` needs: its shards, if they are in one group; its groups; the mask; and its read
counts."""


class FastGets:
    """The datasets whose rows may be read without a check: loaded, and served at any age."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._served: dict[bytes, _Served] = {}
        # A renewed snapshot may have other row objects with the same content.
        cache.events.subscribe(self._serve, Added, Changed, Published, Renewed)
        cache.events.subscribe(self._end, Ended)
        for dataset in cache.datasets.values():
            self._serve(Added(dataset.name))

    def _serve(self, event: Event) -> None:
        name, dataset = event.dataset.encode(), self._cache.dataset(event.dataset)
        snapshot = dataset.snapshot
        if snapshot is None or dataset.settings.on_expired != "serve":
            self._served.pop(name, None)
            return
        groups = snapshot.rows.groups
        shards = groups[0] if len(groups) == 1 else []
        self._served[name] = shards, groups, snapshot.rows.mask, dataset.counts.resp

    def _end(self, event: Event) -> None:
        self._served.pop(event.dataset.encode(), None)

    def hits(self, batch: Sequence[Sequence[bytes]]) -> list[bytes]:
        """Return the replies of the leading GETs of `batch` that need no check.

        A GET that misses, or whose dataset must not be served at any age, ends the list. Most reads take this path, so
        it is inlined: measure `benchmarks.resp` before you shorten it. Consecutive reads of a dataset are counted
        together.
        """
        answers: list[bytes] = []
        add = answers.append
        last = b":"  # no name contains it
        groups: Groups = []
        shards: Shards = []
        mask = counted = 0
        checksum = crc32
        reads: Reads
        try:
            for word, key in batch:
                if word != b"GET" and word != b"get":  # noqa: PLR1714  # a set would be hashed each time
                    break
                name, _, row = key.partition(b":")
                if name != last:
                    if answers:
                        number = len(answers)
                        reads.hit(number - counted)  # noqa: F821  # bound with the first answer
                        counted = number
                    (shards, groups, mask, reads), last = self._served[name], name
                if shards:
                    add(shards[checksum(row) & mask][row])
                else:
                    place = checksum(row) & mask
                    add(groups[place >> PATCHED_GROUP_BITS][place & PATCHED_GROUP_MASK][row])
        except (KeyError, ValueError):
            pass  # no such dataset or row; more or fewer than two words
        if answers:
            reads.hit(len(answers) - counted)
        return answers

    def cut(self, batch: Sequence[Sequence[bytes]], answers: list[bytes], most_bytes: int) -> int:
        """Remove answers that do not fit into a turn, whose commands will run again; return the size of the rest.

        One answer may exceed `most_bytes`.
        """
        size_bytes = 0
        for number, answer in enumerate(answers, 1):
            size_bytes += len(answer)
            if size_bytes >= most_bytes:
                for _, key in batch[number : len(answers)]:
                    self._served[key.partition(b":")[0]][-1].hit(-1)
                del answers[number:]
                break
        return size_bytes
