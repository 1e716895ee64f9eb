"""SCAN and HSCAN; see `cacheservice.ports.resp.scan` for their order and their cursors."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import chain

from cacheservice.ports.resp import reply
from cacheservice.ports.resp.commands.arguments import SYNTAX, cursor_in, number_in
from cacheservice.ports.resp.datasets import Datasets
from cacheservice.ports.resp.reply import CHUNK_ROWS, CommandError, Value
from cacheservice.ports.resp.scan import END_OF_DATASET, MAX_COUNT, glob, scan_rows
from cacheservice.ports.resp.server import Client, Command, Reply, Words


def scan(datasets: Datasets, _: Client, words: Words) -> Reply:
    """Scan datasets by their numbers: for each, its hash and then its rows.

    MATCH and TYPE filter the result; keys that they drop count towards COUNT.
    """
    cursor = cursor_in(words[1])
    options = _options(words[2:], types=True)
    number, place = divmod(cursor, END_OF_DATASET)
    matches = glob(options.match)
    numbered = datasets.in_order()
    index = bisect_left(numbered, (number, b""))
    if index < len(numbered) and numbered[index][0] != number:
        place = 0  # the dataset of the cursor has been removed
    found: list[bytes] = []
    looked_at = 0
    while index < len(numbered) and looked_at < options.count:
        name = numbered[index][1]
        snapshot = datasets.find(name).snapshot
        if snapshot is None or options.type not in (None, b"string", b"hash"):
            index, place = index + 1, 0
            continue
        if place == 0 and options.type != b"string" and (matches is None or matches(name)):
            found.append(name)
        looked_at += place == 0
        if options.type == b"hash":
            place = END_OF_DATASET
        else:
            wanted = max(1, options.count - looked_at)
            place, keys = scan_rows(snapshot.rows, place, wanted, datasets.sorted_shards)
            looked_at += len(keys)
            full = [b"%b:%b" % (name, key) for key in keys]
            found += full if matches is None else filter(matches, full)
        if place == END_OF_DATASET:
            index, place = index + 1, 0
    following = 0 if index >= len(numbered) else numbered[index][0] * END_OF_DATASET + place
    return _page(following, found, looked_at)


def hscan(datasets: Datasets, _: Client, words: Words) -> Reply:
    rows = datasets.whole_hash(words[1])
    cursor = cursor_in(words[2])
    options = _options(words[3:], types=False)
    if rows is None or cursor >= END_OF_DATASET:
        return _page(0, [], 0)
    place, keys = scan_rows(rows, cursor, options.count, datasets.sorted_shards)
    matches = glob(options.match)
    wanted = keys if matches is None else list(filter(matches, keys))
    found = list(chain.from_iterable((key, rows.get(key) or b"") for key in wanted))
    return _page(0 if place == END_OF_DATASET else place, found, len(keys))


@dataclass(frozen=True, slots=True)
class _Options:
    match: bytes = b"*"
    count: int = 10
    type: bytes | None = None


def _options(words: Words, *, types: bool) -> _Options:
    match, count, kind = b"*", 10, None
    if len(words) % 2:
        raise CommandError(SYNTAX)
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option.lower() == b"match":
            match = value
        elif option.lower() == b"count":
            count = number_in(value)
            if count < 1:
                raise CommandError(SYNTAX)
        elif option.lower() == b"type" and types:
            kind = value.lower()
        else:
            raise CommandError(SYNTAX)
    return _Options(match, min(count, MAX_COUNT), kind)


def _page(cursor: int, found: list[bytes], looked_at: int) -> Reply:
    """Return a page of a scan; a slow one as an iterator, which ends its client's turn.

    Otherwise a pipeline of such commands would block the reactor.
    """
    page: list[Value] = [str(cursor), found]
    answer = reply.encode(page, 2)
    return answer if looked_at <= CHUNK_ROWS else iter([answer])


COMMANDS = (
    Command("scan", scan, -2),
    Command("hscan", hscan, -3),
)
