"""Commands about keys of any type."""

from __future__ import annotations

from collections.abc import Iterator

from cacheservice.cache.rows import Rows
from cacheservice.ports.resp import reply
from cacheservice.ports.resp.commands.arguments import name_in
from cacheservice.ports.resp.datasets import Datasets
from cacheservice.ports.resp.reply import CHUNK_ROWS
from cacheservice.ports.resp.server import Client, Command, Reply, Words

_KEYS_PER_TURN = 4096


def exists(datasets: Datasets, _: Client, words: Words) -> Reply:
    keys = words[1:]
    if len(keys) <= CHUNK_ROWS:
        return reply.integer(sum(datasets.kind(key) != "none" for key in keys))
    moment: dict[bytes, Rows] = {}
    for key in keys:
        name = name_in(key)
        if name not in moment:
            moment[name] = datasets.rows(name)

    def some() -> Iterator[bytes]:
        found = 0
        for start in range(0, len(keys), _KEYS_PER_TURN):
            for key in keys[start : start + _KEYS_PER_TURN]:
                name, colon, row = key.partition(b":")
                found += not colon or row in moment[name]
            yield b""
        yield reply.integer(found)

    return some()


def type_(datasets: Datasets, _: Client, words: Words) -> Reply:
    return b"+%b\r\n" % datasets.kind(words[1]).encode()


def ttl(datasets: Datasets, _: Client, words: Words) -> Reply:
    left_s = _left_s(datasets, words[1])
    return reply.integer(-2 if left_s is None else round(left_s))


def pttl(datasets: Datasets, _: Client, words: Words) -> Reply:
    left_s = _left_s(datasets, words[1])
    return reply.integer(-2 if left_s is None else round(left_s * 1000))


def dbsize(datasets: Datasets, _: Client, __: Words) -> Reply:
    return reply.integer(datasets.key_count())


def _left_s(datasets: Datasets, key: bytes) -> float | None:
    """Return the seconds until the dataset of `key` expires, at least 0; None if the key does not exist."""
    if datasets.kind(key) == "none":
        return None
    dataset = datasets.find(name_in(key))
    return max(0.0, dataset.settings.max_age_s - (dataset.age_s() or 0.0))


COMMANDS = (
    Command("exists", exists, -2),
    Command("type", type_, 2),
    Command("ttl", ttl, 2),
    Command("pttl", pttl, 2),
    Command("dbsize", dbsize, 1),
)
